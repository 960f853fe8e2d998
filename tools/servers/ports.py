"""Ports for private servers: free now, and never one that the kernel hands to clients by itself."""

import secrets
import socket
import threading

# Above the well-known services, below Linux's ephemeral range (32768-60999): a client of any program may
# hold a port of that range when the server wants it, and RabbitMQ ends at once when its port is taken.
LOWEST = 10_240
HIGHEST = 32_767

_given: set[int] = set()
_lock = threading.Lock()


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As the servers do: connections of a server that just ended (TIME_WAIT) do not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def free_port() -> int:
    """Return a free port of 127.0.0.1 that no earlier call of this process returned."""
    span = HIGHEST - LOWEST + 1
    # A random start, so that two processes which look at the same moment hardly ever meet.
    start = secrets.randbelow(span)
    with _lock:
        for offset in range(span):
            port = LOWEST + (start + offset) % span
            if port not in _given and is_free(port):
                _given.add(port)
                return port
    raise OSError(f"no free port of 127.0.0.1 between {LOWEST} and {HIGHEST}")
