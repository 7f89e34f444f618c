"""The sockets of the service's address, taken before the model is loaded. Knows no HTTP."""

import contextlib
import errno
import ipaddress
import resource
import socket

from core.errors import ConfigError, ScaledownError
from service.errors import PortError


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches `host`, an address or a name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address that `host` stands for. None listens yet: the port opens when the service is ready.

    Raises PortError where another process has the port, and ConfigError where the address cannot be had at all.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError:
        found = []
    with contextlib.ExitStack() as opened:
        sockets: list[socket.socket] = []
        for family, kind, protocol, _, address in found:
            # Where any port will do, all addresses get the same one.
            taken = sockets[0].getsockname()[1] if sockets else port
            try:
                listener = opened.enter_context(socket.socket(family, kind, protocol))
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind((address[0], taken, *address[2:]))
            except OSError as error:
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):  # `localhost` where there is no IPv6
                    continue
                raise address_error(error, host, port) from None
            sockets.append(listener)
        if not sockets:
            raise ConfigError(f"host: {host} is no address of this machine: give one that is, or 0.0.0.0 for all")
        opened.pop_all()
        return sockets


def allow_connections() -> None:
    """Raise the limit of open files to what this process may have: each connection is one, and 1024 are usual.

    Where none is left nobody is accepted, health probes included, and asyncio fills the log with it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # a kernel may have a lower limit of its own
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def address_error(error: OSError, host: str, port: int) -> ScaledownError:
    """Why an address cannot be listened on, in our words."""
    if error.errno == errno.EADDRINUSE:
        return PortError(f"port: {port} is in use on {host}: stop what listens there or give --port")
    if error.errno == errno.EACCES:
        return ConfigError(f"port: {port} on {host} is not for this user: give --port 1024 or above, or allow it")
    return ConfigError(f"host: {host} cannot be listened on, port {port} ({error.strerror})")
