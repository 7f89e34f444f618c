"""Runs the `python ...` and `scaledown ...` of the docs, each in a fork of one process that has imported torch already.

A shell in a test finds `SHIM` under both names. It hands its arguments, folder, environment and open files over, waits,
and ends as the fork did. So each command is a process of its own, by its own entry point, and starts in a moment.

`python -m tests.docs.fork_server SOCKET` serves until it is stopped.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from typing import Any

from service.exit_status import shell_status
from tests.docs.shortening import shortened

# A program for a bare interpreter: no site-packages, up in a few hundredths of a second.
SHIM = """#!{python} -IS
import json, os, signal, socket, struct, sys
from pathlib import Path
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
request = json.dumps([Path(sys.argv[0]).name, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [struct.pack("!I", len(request))], [0, 1, 2])
server.sendall(request)
(child,) = struct.unpack("!I", server.recv(4, socket.MSG_WAITALL))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _: os.kill(child, number))
sys.exit((server.recv(1) or b"\\1")[0])
"""
IMPORTED = (
    "peft",
    "service.app",
    "service.cli.folders",
    "service.cli.local",
    "training.calibrate",
    "training.evaluate",
    "training.export",
    "training.label",
    "training.prepare",
    "training.train",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
)


def install_shims(folder: Path, address: Path) -> None:
    """Put `python` and `scaledown`, and an `activate` for the path, into `folder`."""
    folder.mkdir(parents=True)
    for name in ("python", "scaledown"):
        (folder / name).write_text(SHIM.format(python=sys.executable, socket=str(address)), encoding="utf-8")
        (folder / name).chmod(0o700)
    (folder / "activate").write_text(f'PATH="{folder}:$PATH"\n', encoding="utf-8")


def serve(address: Path) -> None:
    """Fork for each connection, for ever."""
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks: the kernel buries them
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Run the command that the connection asks for, in a fork, and say how that ended. Ends this process."""
    header, files, _, _ = socket.recv_fds(connection, 4, 3)
    (size,) = struct.unpack("!I", header)
    name, arguments, folder, environment = json.loads(connection.recv(size, socket.MSG_WAITALL))
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    if (command := os.fork()) != 0:  # it may end itself, as the service does
        connection.sendall(struct.pack("!I", command))
        status = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
        connection.sendall(bytes([shell_status(status)]))
        os._exit(0)
    connection.close()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        _run(name, arguments)
        status = 0
    except SystemExit as ending:
        status = ending.code if isinstance(ending.code, int) else 1 if ending.code else 0
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            if not stream.closed:
                stream.flush()
        os._exit(status)


def _run(name: str, given: list[str]) -> Any:
    arguments = shortened(name, given)
    if arguments is None:
        return None
    if name == "scaledown":
        sys.argv = [name, *arguments]
        return sys.exit(importlib.import_module("service.cli.__main__").main())
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        return runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        return exec(rest[0], {"__name__": "__main__"})
    sys.argv = arguments
    return runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
