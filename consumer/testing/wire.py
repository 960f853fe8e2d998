"""HTTP/1.1 on the wire, as much as a proxy needs: whole requests in, whole answers out."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace

#: Longest head of a request or an answer, in bytes.
HEAD_LIMIT = 2**20

Headers = tuple[tuple[str, str], ...]


class NotHttpError(Exception):
    """What came is not HTTP/1.1."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request; ``target`` is the path with its query."""

    method: str
    target: str
    headers: Headers
    body: bytes

    @property
    def path(self) -> str:
        """Return the target without its query, which may hold secrets."""
        return self.target.partition("?")[0]

    def encode(self) -> bytes:
        """Return the bytes to pass on: one request for a connection, its body with its length."""
        bare = not self.body and self.method in {"GET", "HEAD"}
        length = () if bare else (("Content-Length", str(len(self.body))),)
        headers = (*without(self.headers, _OF_THE_HOP), *length, ("Connection", "close"))
        return _head(f"{self.method} {self.target} HTTP/1.1", headers) + self.body


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer with its body as one piece."""

    status: int
    reason: str
    headers: Headers
    body: bytes

    def encode(self, *, close: bool = False) -> bytes:
        """Return the bytes of the answer with its length."""
        return self.head(close=close) + self.body

    def head(self, *, length: int | None = None, close: bool = False, chunked: bool = False) -> bytes:
        """Return the bytes before the body; another length may be claimed."""
        framing: Headers = (("Transfer-Encoding", "chunked"),)
        if not chunked:
            claimed = len(self.body) if length is None else length
            framing = () if self.status in _BODILESS and not claimed else (("Content-Length", str(claimed)),)
        connection = ("Connection", "close" if close else "keep-alive")
        headers = (*without(self.headers, _OF_THE_HOP), *framing, connection)
        return _head(f"HTTP/1.1 {self.status} {self.reason}", headers)

    def with_header(self, name: str, value: str) -> "Answer":
        """Return the answer with one header set or replaced."""
        return replace(self, headers=(*without(self.headers, {name.lower()}), (name, value)))


_OF_THE_HOP = {"connection", "keep-alive", "content-length", "transfer-encoding", "expect", "proxy-connection"}
_BODILESS = {204, 304}


def without(headers: Headers, names: Iterable[str]) -> Headers:
    """Return the headers that do not have one of these names (in lower case)."""
    unwanted = set(names)
    return tuple(item for item in headers if item[0].lower() not in unwanted)


def value_of(headers: Headers, name: str) -> str:
    """Return a header's value, empty when there is none."""
    return next((value for key, value in headers if key.lower() == name), "")


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """Read one whole request; None at the end of the connection. Raises ``NotHttpError``."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except asyncio.LimitOverrunError as error:
        raise NotHttpError("the head of the request is too long") from error
    first, headers = _split(head)
    try:
        method, target, _version = first.split(" ", 2)
    except ValueError:
        raise NotHttpError(f"no request line: {first[:80]!r}") from None
    try:
        body = await _body(reader, headers)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return Request(method, target, headers, body)


async def _body(reader: asyncio.StreamReader, headers: Headers) -> bytes:
    if "chunked" in value_of(headers, "transfer-encoding").lower():
        pieces = []
        while size := int((await reader.readline()).split(b";")[0], 16):
            pieces.append(await reader.readexactly(size))
            await reader.readline()
        while (await reader.readline()).strip():
            pass
        return b"".join(pieces)
    return await reader.readexactly(int(value_of(headers, "content-length") or 0))


def parse_answer(raw: bytes) -> Answer:
    """Take the bytes of a connection that was closed after its one answer apart. Raises ``NotHttpError``."""
    while True:
        head, mark, body = raw.partition(b"\r\n\r\n")
        first, headers = _split(head)
        parts = first.split(" ", 2)
        if not mark or len(parts) < 2 or not parts[1].isdigit():  # noqa: PLR2004 - version and status
            raise NotHttpError(f"no answer: {raw[:80]!r}")
        status = int(parts[1])
        if not 100 <= status < 200:  # noqa: PLR2004 - interim answers are skipped
            break
        raw = body
    if "chunked" in value_of(headers, "transfer-encoding").lower():
        body = _joined(body)
    return Answer(status, parts[2] if len(parts) > 2 else "", headers, body)  # noqa: PLR2004 - a reason may be absent


def _joined(chunked: bytes) -> bytes:
    pieces: list[bytes] = []
    at = 0
    while True:
        end = chunked.index(b"\r\n", at)
        size = int(chunked[at:end].split(b";")[0], 16)
        if not size:
            return b"".join(pieces)
        pieces.append(chunked[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


def _split(head: bytes) -> tuple[str, Headers]:
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if ":" in line)
    return first, tuple((name.strip(), value.strip()) for name, _, value in pairs)


def _head(first: str, headers: Headers) -> bytes:
    lines = [first, *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
