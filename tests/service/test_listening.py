"""Which sockets stand for an address, and what is said where there are none."""

import errno
import resource
import socket

import pytest

from core.errors import ConfigError
from service.errors import PortError
from service.listening import address_error, allow_connections, bind


def test_all_addresses_of_a_name_get_the_same_port_and_nobody_listens_yet() -> None:
    sockets = bind("localhost", 0)
    try:
        assert len({each.getsockname()[1] for each in sockets}) == 1
        for each in sockets:
            with socket.socket(each.family) as client:
                assert client.connect_ex(each.getsockname()) == errno.ECONNREFUSED
    finally:
        for each in sockets:
            each.close()


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(PortError, match=r"^port: .*--port"):
        bind(*other.getsockname())


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^host: 192\.0\.2\.1 is no address of this machine"):
        bind("192.0.2.1", 0)


def test_a_port_that_is_not_for_this_user_is_named() -> None:
    refusal = address_error(PermissionError(errno.EACCES, "Permission denied"), "127.0.0.1", 80)
    assert isinstance(refusal, ConfigError)
    assert refusal.message == "port: 80 on 127.0.0.1 is not for this user: give --port 1024 or above, or allow it"


def test_connections_are_as_many_as_the_process_may_have() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        allow_connections()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
