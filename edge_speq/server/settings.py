"""Settings and limits of a server."""

from __future__ import annotations

from dataclasses import dataclass

from edge_speq.errors import EdgeError


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Sizes are in bytes, times in seconds. Raises EdgeError for impossible values."""

    name: str  # name of the model for clients
    host: str = "127.0.0.1"
    port: int = 8080  # 0: any free one
    api_key: str | None = None
    n_waiting: int = 32  # requests that may wait while one is served
    n_connections: int = 256
    max_body: int = 4 << 20
    header_seconds: float = 20.0  # limit for sending the head of a request
    body_seconds: float = 30.0  # limit for sending its body
    stall_seconds: float = 60.0  # limit for a client to read a full buffer
    grace_seconds: float = 10.0  # time for the running request to end when the server stops

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise EdgeError(f"port={self.port} is not a port", "give 1 to 65535, or 0 for any free one", usage=True)
        if self.n_waiting < 0:
            raise EdgeError(f"queue={self.n_waiting} is not a number of requests", "give 0 or more", usage=True)
        key = self.api_key
        if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
            raise EdgeError("the API key cannot be sent in a header", "use printable ASCII without blanks", usage=True)
