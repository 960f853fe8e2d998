"""What the fault proxy does to a request: one function for each fault of the table that acts on an exchange.

The two that act on the connection before there is a request (``connection_refused``, ``closed_at_accept``) are the
proxy's own.
"""

import asyncio
import functools
import socket
import struct
import zlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http import HTTPStatus

from consumer.testing.wire import Answer, Request

HUGE_BYTES = 512 * 1024**2
BOMB_BYTES = 256 * 1024**2
FLOOD_HEADERS = 20_000
_PIECE = b"x" * 1024**2
_DRIPS = 8  # bytes that a dripping answer gets out within the attempt's limit

_LOGIN = b"""<!DOCTYPE html><html><head><title>Sign in</title></head><body>
<form action="/login" method="post"><input name="username"><input name="password" type="password"></form>
</body></html>"""
_LAUGHS = (
    b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY l0 "lol">'
    + b"".join(b'<!ENTITY l%d "%s">' % (n, b"&l%d;" % (n - 1) * 10) for n in range(1, 11))
    + b"]><l>&l10;</l>"
)


#: Passes a request on to the server and gives its whole answer.
Upstream = Callable[[Request], Awaitable[Answer]]


@dataclass
class Exchange:
    """One request that is struck, and the connection it came on. ``keep``: the connection serves the next one.

    ``limit_seconds`` is the attempt's limit, ``late_seconds`` how long after the client a late commit comes, and
    ``trap_url`` the other host that a redirect leads to.
    """

    request: Request
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    forward: Upstream
    limit_seconds: float
    late_seconds: float
    trap_url: str
    keep: bool = False

    async def answer(self) -> Answer:
        """Let the server do it and give its answer."""
        return await self.forward(self.request)

    async def send(self, data: bytes) -> None:
        """Write to the client, however far it still reads."""
        with suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    def reset(self) -> None:
        """End the connection with a reset."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.writer.transport.abort()

    async def client_gone(self) -> None:
        """Wait until the client hangs up, or until its attempt must be over."""
        with suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(self.limit_seconds * 1.5):
                while await self.reader.read(65_536):
                    pass


Strike = Callable[[Exchange, str], Awaitable[None]]


async def reset_before_forward(x: Exchange, _variant: str) -> None:
    """Reset."""
    x.reset()


async def lost_after_commit(x: Exchange, variant: str) -> None:
    """Let the server do it, and lose its answer."""
    await x.answer()
    if variant == "reset":
        x.reset()


async def late_commit(x: Exchange, _variant: str) -> None:
    """Pass the request on when nobody waits for it any more."""
    await x.client_gone()
    await asyncio.sleep(x.late_seconds)
    await x.answer()


async def black_hole(x: Exchange, _variant: str) -> None:
    """Say nothing."""
    await x.client_gone()


async def slow_drip(x: Exchange, _variant: str) -> None:
    """Give the answer byte by byte."""
    raw = (await x.answer()).encode()
    gone = asyncio.ensure_future(x.client_gone())
    for number in range(len(raw)):
        x.writer.write(raw[number : number + 1])
        done, _ = await asyncio.wait({gone}, timeout=x.limit_seconds / _DRIPS)
        if done:
            return


async def closed_idle(x: Exchange, _variant: str) -> None:
    """Give the answer, promise to stay, and go."""
    await x.send((await x.answer()).encode())


async def cut_in_headers(x: Exchange, _variant: str) -> None:
    """Give half of the head."""
    head = (await x.answer()).head()
    await x.send(head[: len(head) // 2])


async def cut_in_body(x: Exchange, _variant: str) -> None:
    """Give half of the body."""
    answer = await x.answer()
    await x.send(answer.head(length=len(answer.body) + 16) + answer.body[: len(answer.body) // 2])


async def cut_in_chunk(x: Exchange, _variant: str) -> None:
    """Give half of a chunk."""
    answer = await x.answer()
    start = answer.head(chunked=True) + b"%x\r\n" % (len(answer.body) + 16)
    await x.send(start + answer.body[: len(answer.body) // 2])


async def empty_body(x: Exchange, _variant: str) -> None:
    """Give the status alone."""
    answer = await x.answer()
    await x.send(Answer(answer.status, answer.reason, (), b"").encode())
    x.keep = True


async def error_body_200(x: Exchange, _variant: str) -> None:
    """Say 200 and tell of an error."""
    await x.answer()
    await _say(x, HTTPStatus.OK, b'{"error": {"code": "internal", "message": "something went wrong"}}', _JSON)


async def login_page_200(x: Exchange, _variant: str) -> None:
    """Ask for a password."""
    await _say(x, HTTPStatus.OK, _LOGIN)


async def wrong_content_type(x: Exchange, _variant: str) -> None:
    """Label the answer wrongly."""
    await _pass_on(x, (await x.answer()).with_header("Content-Type", "application/octet-stream"))


async def wrong_encoding(x: Exchange, _variant: str) -> None:
    """Put bytes into the answer that are no UTF-8."""
    answer = await x.answer()
    middle = len(answer.body) // 2
    body = answer.body[:middle] + b"\xff\xfe\xc3" + answer.body[middle:]
    kind = next((value for name, value in answer.headers if name.lower() == "content-type"), "application/json")
    labelled = answer.with_header("Content-Type", kind.partition(";")[0] + "; charset=utf-8")
    await _pass_on(x, replace(labelled, body=body))


async def redirect_loop(x: Exchange, _variant: str) -> None:
    """Lead back to where it came from."""
    await _say(x, HTTPStatus.FOUND, b"", _HTML, ("Location", x.request.target))


async def redirect_other_host(x: Exchange, _variant: str) -> None:
    """Lead to the trap."""
    await _say(x, HTTPStatus.TEMPORARY_REDIRECT, b"", _HTML, ("Location", x.trap_url + x.request.target))


def _refuses(status: HTTPStatus) -> Strike:
    async def strike(x: Exchange, _variant: str) -> None:
        """Refuse as a gateway does, the server sees nothing."""
        challenge = (("WWW-Authenticate", "Token"),) if status == HTTPStatus.UNAUTHORIZED else ()
        await _say(x, status, _page(status), _HTML, *challenge)

    return strike


async def rate_limited(x: Exchange, _variant: str) -> None:
    """Ask to wait and not say how long."""
    await _say(x, HTTPStatus.TOO_MANY_REQUESTS, _page(HTTPStatus.TOO_MANY_REQUESTS))


async def rate_limited_seconds(x: Exchange, _variant: str) -> None:
    """Ask to wait for seven seconds."""
    await _say(x, HTTPStatus.TOO_MANY_REQUESTS, b"slow down", _HTML, ("Retry-After", "7"))


async def rate_limited_date(x: Exchange, variant: str) -> None:
    """Ask to wait until half a minute from now, by a clock that is hours off."""
    now = datetime.now(UTC) + timedelta(hours=-5 if variant == "slow" else 9)
    dates = ("Date", _date(now)), ("Retry-After", _date(now + timedelta(seconds=30)))
    await _say(x, HTTPStatus.TOO_MANY_REQUESTS, b"slow down", _HTML, *dates)


async def rate_limited_senseless(x: Exchange, variant: str) -> None:
    """Ask to wait in a way that makes no sense."""
    wish = {"word": "in a moment", "negative": "-5", "endless": "9" * 30}[variant]
    await _say(x, HTTPStatus.TOO_MANY_REQUESTS, b"slow down", _HTML, ("Retry-After", wish))


async def error_500_after_commit(x: Exchange, _variant: str) -> None:
    """Do it and say that it went wrong."""
    await x.answer()
    await _say(x, HTTPStatus.INTERNAL_SERVER_ERROR, _page(HTTPStatus.INTERNAL_SERVER_ERROR))


async def gateway_error_after_commit(x: Exchange, variant: str) -> None:
    """Do it, and let the gateway say that nobody answered."""
    await x.answer()
    status = HTTPStatus(int(variant))
    wish = (("Retry-After", "7"),) if status == HTTPStatus.SERVICE_UNAVAILABLE else ()
    await _say(x, status, _page(status), _HTML, *wish)


async def wrong_clock(x: Exchange, variant: str) -> None:
    """Give the answer with a date of another century."""
    moment = datetime(int(variant), 1, 1, tzinfo=UTC)
    await _pass_on(x, (await x.answer()).with_header("Date", _date(moment)))


async def huge_body(x: Exchange, _variant: str) -> None:
    """Give an answer that fills memory."""
    answer = await x.answer()
    await x.send(answer.head(length=HUGE_BYTES))
    for _ in range(HUGE_BYTES // len(_PIECE)):
        if x.writer.is_closing():
            return
        await x.send(_PIECE)


async def gzip_bomb(x: Exchange, _variant: str) -> None:
    """Give a small answer that unpacks to one that fills memory."""
    answer = await x.answer()
    packed = answer.with_header("Content-Encoding", "gzip")
    await _pass_on(x, replace(packed, status=_with_body(answer.status), body=await asyncio.to_thread(_bomb)))


async def xml_bomb(x: Exchange, _variant: str) -> None:
    """Give XML whose entities grow without end."""
    await x.answer()
    await _say(x, HTTPStatus.OK, _LAUGHS, ("Content-Type", "text/xml"))


async def duplicate_answer(x: Exchange, _variant: str) -> None:
    """Give the answer twice."""
    raw = (await x.answer()).encode()
    await x.send(raw + raw)
    x.keep = True


async def garbage_before_answer(x: Exchange, _variant: str) -> None:
    """Give rubbish first."""
    await x.send(b"\x00\x01 no HTTP at all \xff\r\n" + (await x.answer()).encode())


async def continue_100(x: Exchange, _variant: str) -> None:
    """Give interim answers first."""
    interim = b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + b"HTTP/1.1 103 Early Hints\r\nLink: </style.css>\r\n\r\n"
    await x.send(interim + (await x.answer()).encode())
    x.keep = True


async def header_flood(x: Exchange, _variant: str) -> None:
    """Give far too many headers."""
    answer = await x.answer()
    flood = tuple((f"X-Flood-{number}", "x" * 64) for number in range(FLOOD_HEADERS))
    await _pass_on(x, replace(answer, headers=(*answer.headers, *flood)))


async def tls_alert(x: Exchange, _variant: str) -> None:
    """Answer as a TLS server does that was spoken to in plain."""
    await x.send(b"\x15\x03\x03\x00\x02\x02\x46")


STRIKES: dict[str, Strike] = {
    **{
        strike.__name__: strike
        for strike in (
            reset_before_forward, lost_after_commit, late_commit, black_hole, slow_drip, closed_idle, cut_in_headers,
            cut_in_body, cut_in_chunk, empty_body, error_body_200, login_page_200, wrong_content_type, wrong_encoding,
            redirect_loop, redirect_other_host, rate_limited, rate_limited_seconds, rate_limited_date,
            rate_limited_senseless, error_500_after_commit, gateway_error_after_commit, wrong_clock, huge_body,
            gzip_bomb, xml_bomb, duplicate_answer, garbage_before_answer, continue_100, header_flood, tls_alert,
        )
    },
    "unauthorized_401": _refuses(HTTPStatus.UNAUTHORIZED),
    "forbidden_403": _refuses(HTTPStatus.FORBIDDEN),
    "not_found_404": _refuses(HTTPStatus.NOT_FOUND),
    "request_timeout_408": _refuses(HTTPStatus.REQUEST_TIMEOUT),
    "conflict_409": _refuses(HTTPStatus.CONFLICT),
    "too_large_413": _refuses(HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
    "error_500_before_commit": _refuses(HTTPStatus.INTERNAL_SERVER_ERROR),
}  # fmt: skip

_JSON = ("Content-Type", "application/json")
_HTML = ("Content-Type", "text/html; charset=utf-8")


async def _say(
    x: Exchange, status: HTTPStatus, body: bytes, kind: tuple[str, str] = _HTML, *headers: tuple[str, str]
) -> None:
    await _pass_on(x, Answer(status, status.phrase, (kind, *headers), body))


async def _pass_on(x: Exchange, answer: Answer) -> None:
    await x.send(answer.encode())
    x.keep = True


def _page(status: HTTPStatus) -> bytes:
    title = f"{int(status)} {status.phrase}"
    return f"<html><head><title>{title}</title></head><body><center><h1>{title}</h1></center></body></html>".encode()


def _date(moment: datetime) -> str:
    return format_datetime(moment, usegmt=True)


def _with_body(status: int) -> int:
    return HTTPStatus.OK if status == HTTPStatus.NO_CONTENT else status


@functools.cache
def _bomb() -> bytes:
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    zeros = bytes(len(_PIECE))
    pieces = [packer.compress(zeros) for _ in range(BOMB_BYTES // len(zeros))]
    return b"".join((*pieces, packer.flush()))
