"""The socket that a server listens on."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any

from edge_speq.errors import EdgeError
from edge_speq.server.settings import ServerSettings

BACKLOG = 128
IDLE, INTERVAL, PROBES = 60, 15, 4  # seconds, seconds, probes of TCP keep-alive


def listen(settings: ServerSettings) -> socket.socket:
    """Return a listening socket on the settings' host and port.

    Raises EdgeError if the port is taken, if the host is not this machine's, and if other machines could connect
    without a key.
    """
    family, address = _resolve(settings.host, settings.port)
    if settings.api_key is None and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
        raise EdgeError(
            f"other machines can reach {settings.host}, and no API key is set",
            "give --api-key, --api-key-file or EDGE_SPEQ_API_KEY, or leave --host out",
            usage=True,
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where SO_REUSEADDR would share the port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _keep_alive(listener)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise EdgeError(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}",
            "another program has the port: choose one with --port, 0 for any free one",
        ) from error
    return listener


def url(listener: socket.socket, host: str) -> str:
    """Return the URL of the server for a browser on this machine."""
    address, port = listener.getsockname()[:2]
    if ipaddress.ip_address(address.partition("%")[0]).is_unspecified:
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _resolve(host: str, port: int) -> tuple[int, Any]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise EdgeError(
            f"{host} is not an address: {error.strerror}", "give one of this machine's", usage=True
        ) from error
    family, *_, address = found[0]
    return family, address


def _keep_alive(listener: socket.socket) -> None:
    """Let accepted sockets detect within two minutes that a client's machine has disappeared."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", IDLE), ("TCP_KEEPINTVL", INTERVAL), ("TCP_KEEPCNT", PROBES)):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
