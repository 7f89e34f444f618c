"""A port of this machine that nobody listens on."""

import socket


def free_port() -> int:
    """Free when this returns: whoever starts a server on it should do so at once."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port
