"""The door to HTTP for destinations: one client each, and one translation of failures into what happens next.

A failure before the request can have left is ``Transient``. One after it is ``UnknownOutcome`` for a request that
creates or changes something, ``Transient`` for one that only reads. Nothing that creates or changes
something is sent twice here, the engine decides that; aiohttp itself repeats a GET that only reads and whose
connection was closed without an answer.
"""

import functools
import re
import ssl
import time
import urllib.request
from collections.abc import AsyncIterator, Collection, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urljoin, urlsplit

import aiohttp
import httpx
from aiohttp.abc import AbstractStreamWriter
from aiohttp.connector import Connection
from httpx_aiohttp import AiohttpTransport
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from consumer.destinations.contract import no_request_after
from consumer.errors import DestinationError, Misconfigured, Transient, UnknownOutcome
from consumer.telemetry import get_logger

CONNECT_SECONDS = 10.0
READ_SECONDS = 60.0
#: gunicorn closes idle connections after 2 s; a create on one that is just being closed would be of unknown outcome.
KEEPALIVE_SECONDS = 1.5
MAX_BODY_BYTES = 64 * 1024**2
QUOTE_LENGTH = 300

_QUOTED_BYTES = 4096
_PIECE_BYTES = 1024**2
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")
#: Raised while a connection is made. httpx-aiohttp gives httpx.ConnectTimeout for these and for a server that hung
#: up in the middle of a request alike, so only the cause of an error tells whether something was sent.
_NOT_SENT = (
    aiohttp.ClientConnectorError,
    aiohttp.ConnectionTimeoutError,
    aiohttp.ClientHttpProxyError,
    aiohttp.InvalidURL,
)


class _AttemptOverError(aiohttp.ClientConnectionError):
    """The request did not leave."""


class _Sent:
    """Whether a request that must not go out twice has begun to leave."""

    begun = False


_sent: ContextVar[_Sent | None] = ContextVar("_sent", default=None)
_ADDRESS = re.compile(r"https?://\S+")

_log = get_logger()


class TlsSettings(BaseModel):
    """Whom to trust, the same for all destinations; their ``Settings`` inherit from it."""

    model_config = ConfigDict(frozen=True, validate_by_name=True, validate_by_alias=True)

    cert_bundle: str | None = Field(
        None, validation_alias="NX_CERT_BUNDLE", description="further CA certificates as PEM text, \\n for line ends"
    )
    cert_bundle_file: Path | None = Field(
        None, validation_alias="NX_CERT_BUNDLE_FILE", description="PEM file of further CA certificates"
    )
    disable_ssl_verify: bool = Field(
        default=False, validation_alias="NX_DISABLE_SSL_VERIFY", description="trust any certificate; for tests only"
    )

    def context(self) -> ssl.SSLContext:
        """Return what connections are checked with: the system's CAs and the bundle.

        Raises ``Misconfigured`` when the bundle cannot be read.
        """
        context = ssl.create_default_context()
        if self.disable_ssl_verify:
            _warn_of_no_verification()
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            return context
        name = "NX_CERT_BUNDLE" if self.cert_bundle else "NX_CERT_BUNDLE_FILE"
        try:
            if self.cert_bundle:
                context.load_verify_locations(cadata=self.cert_bundle.replace("\\n", "\n"))
            elif self.cert_bundle_file:
                context.load_verify_locations(cafile=self.cert_bundle_file.expanduser())
        except ssl.SSLError as error:
            raise Misconfigured(f"{name} holds no certificates in PEM form ({error.reason or error})") from None
        except (OSError, ValueError) as error:
            raise Misconfigured(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        return context


@functools.cache
def _warn_of_no_verification() -> None:
    """Warn once in the life of the process."""
    _log.warning("ssl_verification_off", setting="NX_DISABLE_SSL_VERIFY", risk="anybody on the way reads the tokens")


def _base_url(value: str) -> str:
    value = value.strip()
    if not value:
        return ""
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be an address like https://cdcs.example.org/")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("must be an address without user, password, ? and #")
    return value if value.endswith("/") else value + "/"


#: Base address of a service; it ends with a slash.
BaseUrl = Annotated[str, AfterValidator(_base_url)]


class HttpClient:
    """Speaks with one destination; ``setting`` names the setting of its address, for messages.

    Cookies are not kept: with a session cookie CDCS would ask for a CSRF token. Redirects are not followed: they
    turn a POST into a GET. A body over ``max_body_bytes`` counts as a broken answer.
    """

    def __init__(
        self,
        base_url: str,
        tls: TlsSettings,
        *,
        setting: str,
        headers: Mapping[str, str] | None = None,
        connect_seconds: float = CONNECT_SECONDS,
        read_seconds: float = READ_SECONDS,
        max_body_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        self._base_url = base_url
        self._tls = tls
        self._setting = setting
        self._headers = dict(headers or {})
        self._secrets = [value.split()[-1] for name, value in self._headers.items() if _is_secret(name, value)]
        self._timeout = httpx.Timeout(None, connect=connect_seconds, read=read_seconds)
        self._max_body_bytes = max_body_bytes
        self._client: httpx.AsyncClient | None = None

    async def aclose(self) -> None:
        """Close all connections; a later request opens new ones."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def request(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: Mapping[str, str | int] | None = None,
        creates: bool = False,
        pass_through: Collection[int] = (),
        **parts: Any,
    ) -> httpx.Response:
        """Send one request and return the whole answer; ``parts`` (content, files, headers, ...) go to httpx.

        ``creates``: the request changes something, so its loss is an unknown outcome. Statuses from 300 on that the
        caller gets are those of ``pass_through`` and 4xx other than 407, 408 and 429; the rest is raised.
        """
        client = self._open()
        sent = _Sent()
        _sent.set(sent if creates else None)
        request = await _in_pieces(client.build_request(method, path, json=json, params=params, **parts))
        try:
            answer = await self._exchange(client, request)
        except (httpx.HTTPError, aiohttp.ClientError, OSError) as error:
            raise _failure(error, request, creates=creates, begun=sent.begun) from None
        if answer.status_code not in pass_through:
            self._judge(answer, creates=creates)
        return answer

    def json_of(self, answer: httpx.Response, *, creates: bool = False) -> Any:
        """Return an answer's JSON value; what is no JSON counts as a broken answer."""
        try:
            return answer.json()
        except ValueError:
            message = f"{_where(answer.request)} answered {answer.status_code} with no JSON: {self.quote(answer)}"
            raise _lost(message, creates=creates) from None

    def quote(self, answer: httpx.Response) -> str:
        """Return the start of an answer's body for a message: one line, no secrets."""
        text = answer.content[:_QUOTED_BYTES].decode(errors="replace")
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return one_line(text)

    def _open(self) -> httpx.AsyncClient:
        if self._client is None:
            context, proxy = self._tls.context(), _proxy(self._base_url)
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_SECONDS, ssl=context)
            session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), request_class=_LeasedRequest
            )
            self._client = httpx.AsyncClient(
                base_url=self._base_url,
                headers=self._headers,
                timeout=self._timeout,
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                transport=AiohttpTransport(verify=context, proxy=proxy, client=session),
            )
        return self._client

    async def _exchange(self, client: httpx.AsyncClient, request: httpx.Request) -> httpx.Response:
        streamed = await client.send(request, stream=True)
        try:
            body = bytearray()
            async for chunk in streamed.aiter_bytes():
                body += chunk
                if len(body) > self._max_body_bytes:
                    raise httpx.DecodingError(f"the answer is longer than {self._max_body_bytes} bytes")
        finally:
            await streamed.aclose()
        # httpx would decode the body once more
        headers = [item for item in streamed.headers.multi_items() if item[0] not in _OF_THE_TRANSFER]
        return httpx.Response(
            streamed.status_code,
            headers=headers,
            content=bytes(body),
            request=request,
            extensions=streamed.extensions,
        )

    def _judge(self, answer: httpx.Response, *, creates: bool) -> None:
        """Raise where the status alone says what happens next."""
        status = answer.status_code
        if answer.is_redirect:
            raise Misconfigured(
                f"{_where(answer.request)} is redirected to {_target(answer)}; is {self._setting} right?"
            )
        text = f"{_where(answer.request)} answered {status} {answer.reason_phrase}: {self.quote(answer)}"
        if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            raise Misconfigured(text)
        wait = retry_after_seconds(answer.headers)
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            raise Transient(text, retry_after=wait, code="rate_limited")
        if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.REQUEST_TIMEOUT:
            if creates:
                raise UnknownOutcome(text, retry_after=wait)
            raise Transient(text, retry_after=wait, code="server_error")


class _LeasedRequest(aiohttp.ClientRequest):
    """Refuses to leave when the attempt is over, at the last moment before the first byte is written.

    A process that was stopped for long goes on where it was: its time limit only acts when it next waits.
    """

    async def send(self, conn: Connection) -> aiohttp.ClientResponse:
        """Check the time, and send; aiohttp would send any GET, PUT or DELETE again after a lost connection."""
        sent = _sent.get()
        if sent is not None and sent.begun:
            raise aiohttp.ServerDisconnectedError("closed without an answer")
        if time.monotonic() >= no_request_after.get():
            raise _AttemptOverError("the attempt's time was over before the request could leave")
        if sent is not None:
            sent.begun = True
        return await super().send(conn)

    async def write_bytes(
        self, writer: AbstractStreamWriter, conn: Connection, content_length: int | None = None
    ) -> None:
        """Check again: before Python 3.12 head and body leave in a task of their own, a turn of the loop later."""
        if time.monotonic() < no_request_after.get():
            await super().write_bytes(writer, conn, content_length)
        elif conn.protocol is not None:
            conn.protocol.set_exception(_AttemptOverError("the attempt's time was over before the body could leave"))


_OF_THE_TRANSFER = {"content-encoding", "content-length", "transfer-encoding"}


class _Pieces(httpx.AsyncByteStream):
    def __init__(self, content: bytes) -> None:
        self._content = content

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._content), _PIECE_BYTES):
            yield self._content[start : start + _PIECE_BYTES]


async def _in_pieces(request: httpx.Request) -> httpx.Request:
    """Let the loop do other work while a large body goes out; multipart bodies too are sent with their length."""
    content = await request.aread()
    if len(content) <= _PIECE_BYTES:
        return request
    headers, extensions = request.headers, request.extensions
    headers.pop("Transfer-Encoding", None)
    headers["Content-Length"] = str(len(content))
    stream = _Pieces(content)
    return httpx.Request(request.method, request.url, headers=headers, stream=stream, extensions=extensions)


def retry_after_seconds(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Return what ``Retry-After`` asks for, in seconds; None when it is absent or makes no sense.

    A date counts from the answer's own ``Date``, so that neither clock has to be right; ``now`` stands in for it.
    """
    wish = headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(wish):
        return float(wish)
    until = _moment(wish)
    if until is None:
        return None
    start = _moment(headers.get("Date", "")) or now or datetime.now(UTC)
    return max(0.0, (until - start).total_seconds())


def one_line(text: str, length: int = QUOTE_LENGTH) -> str:
    """Return a text without line ends and control characters, cut to a length."""
    # runs of blanks are cut first, since a body may be a page of them
    words = "".join(c if c.isprintable() else " " for c in text[: length * 20]).split()
    line = " ".join(words)
    return line if len(line) <= length else line[: length - 1] + "…"


def _moment(text: str) -> datetime | None:
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _is_secret(name: str, value: str) -> bool:
    return name.lower() == "authorization" and bool(value.split())


def _proxy(base_url: str) -> httpx.Proxy | None:
    """Return the proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY ask for; a transport of our own does not look."""
    parts = urlsplit(base_url)
    proxies = urllib.request.getproxies()
    url = proxies.get(parts.scheme) or proxies.get("all")
    if not url or urllib.request.proxy_bypass(parts.netloc):
        return None
    return httpx.Proxy(url if "://" in url else f"http://{url}")


def _where(request: httpx.Request) -> str:
    return f"{request.method} {_host(request)}{request.url.path}"


def _host(request: httpx.Request) -> str:
    return request.url.netloc.decode("ascii", "replace")


def _target(answer: httpx.Response) -> str:
    """Return where a redirect points to, without user, password and query."""
    try:
        parts = urlsplit(urljoin(str(answer.request.url), answer.headers.get("Location", "")))
    except ValueError:
        return "an address that cannot be read"
    return one_line(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}")


def _lost(message: str, *, creates: bool) -> DestinationError:
    return UnknownOutcome(message) if creates else Transient(message, code="no_answer")


def _failure(error: Exception, request: httpx.Request, *, creates: bool, begun: bool) -> DestinationError:
    """Say what an exchange without an answer means; ``begun``: the request had begun to leave before the error."""
    cause = error if isinstance(error, aiohttp.ClientError) else error.__cause__ or error
    if isinstance(cause, aiohttp.ClientConnectorCertificateError) and not begun:
        why = getattr(cause.certificate_error, "verify_message", "") or cause.certificate_error
        return Misconfigured(
            f"the certificate of {_host(request)} is not trusted ({one_line(str(why))}); "
            "add the CA that signed it to NX_CERT_BUNDLE_FILE"
        )
    reason = _reason(cause)
    if isinstance(cause, _AttemptOverError):
        return Transient(f"{_where(request)}: {reason}", code="timeout")
    if isinstance(cause, _NOT_SENT) and not begun:
        return Transient(f"cannot connect to {_host(request)}: {reason}", code="cannot_connect")
    return _lost(f"{_where(request)} got no complete answer ({reason})", creates=creates)


def _reason(cause: BaseException) -> str:
    """Describe an error without the address, whose query may hold secrets."""
    if isinstance(cause, aiohttp.ConnectionTimeoutError):
        return "no connection in time"
    if isinstance(cause, aiohttp.ClientConnectorError):
        return one_line(cause.os_error.strerror or str(cause.os_error))
    text = cause.message if isinstance(cause, aiohttp.ClientResponseError) else str(cause)
    text = _ADDRESS.sub("...", text)
    return one_line(f"{type(cause).__name__}: {text}" if text else type(cause).__name__)
