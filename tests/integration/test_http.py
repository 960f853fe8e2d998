"""What becomes of requests when the server, or the way to it, fails; against small servers of this process."""

import asyncio
import contextlib
import gzip
import itertools
import socket
import ssl
import struct
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from consumer.destinations import http
from consumer.destinations.contract import no_request_after
from consumer.destinations.http import HttpClient, TlsSettings
from consumer.errors import DestinationError, Misconfigured, Transient, UnknownOutcome
from tools.servers.ports import free_port

SECRET = "s3cret-token"
Answerer = Callable[[str, asyncio.StreamWriter], Awaitable[None]]


class Server:
    """A server that hands each request, as text, to a function which writes the answer or does something worse."""

    def __init__(self, answer: Answerer) -> None:
        self._answer = answer
        self.requests: list[str] = []
        self.connections = 0
        self._tasks: list[asyncio.Task[Any]] = []

    @contextlib.asynccontextmanager
    async def running(self, context: ssl.SSLContext | None = None) -> AsyncIterator[str]:
        """Serve until the end of the block, and give the address."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=context)
        scheme = "https" if context else "http"
        async with server:
            yield f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/base/"
            async with asyncio.timeout(5):
                await asyncio.gather(*self._tasks)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._tasks += filter(None, [asyncio.current_task()])
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                request = (await reader.readuntil(b"\r\n\r\n")).decode()
                for line in request.lower().splitlines():
                    if line.startswith("content-length:"):
                        request += (await reader.readexactly(int(line.partition(":")[2]))).decode()
                self.requests.append(request)
                await self._answer(request, writer)
                await writer.drain()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def says(status: str, body: bytes = b"", *headers: str) -> Answerer:
    async def answer(_request: str, writer: asyncio.StreamWriter) -> None:
        lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    return answer


async def hangs_up(_request: str, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def resets(_request: str, writer: asyncio.StreamWriter) -> None:
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def cuts_the_body(_request: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 201 Created\r\nContent-Length: 400\r\n\r\n{"id": 1')
    writer.close()


async def cuts_a_chunk(_request: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b'HTTP/1.1 201 Created\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n{"id": 1')
    writer.close()


async def talks_nonsense(_request: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    writer.close()


async def stalls(_request: str, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.6)
    writer.close()


async def stalls_in_the_body(_request: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: 400\r\n\r\n{")
    await stalls(_request, writer)


LOSSES = [hangs_up, resets, cuts_the_body, cuts_a_chunk, talks_nonsense, stalls, stalls_in_the_body]


@contextlib.asynccontextmanager
async def client_of(url: str, tls: TlsSettings | None = None, **options: Any) -> AsyncIterator[HttpClient]:
    headers = {"Authorization": f"Token {SECRET}"}
    client = HttpClient(url, tls or TlsSettings(), setting="NX_TEST_URL", headers=headers, **options)
    try:
        yield client
    finally:
        await client.aclose()


async def failure_of(answer: Answerer, **options: Any) -> DestinationError:
    """Return the error of one request with a secret in its query; neither secret may be in the message."""
    async with Server(answer).running() as url, client_of(url, read_seconds=0.3) as client:
        with pytest.raises(DestinationError) as caught:
            await client.request(options.pop("method", "POST"), "path/", params={"key": SECRET}, **options)
    assert SECRET not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("loss", LOSSES)
async def test_a_create_without_an_answer_is_of_unknown_outcome(loss: Answerer) -> None:
    error = await failure_of(loss, json={"a": 1}, creates=True)
    assert isinstance(error, UnknownOutcome)
    assert str(error).startswith("POST 127.0.0.1:")
    assert "/base/path/ got no complete answer (" in str(error)


@pytest.mark.parametrize("loss", LOSSES)
async def test_a_read_without_an_answer_is_tried_again_later(loss: Answerer) -> None:
    error = await failure_of(loss, method="GET")
    assert isinstance(error, Transient)
    assert error.code == "no_answer"


async def test_a_reset_in_the_middle_of_a_request_shows_no_secret() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        await resets("", writer)

    server = await asyncio.start_server(reset, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with server, client_of(url) as client:
        with pytest.raises(UnknownOutcome, match="got no complete answer") as caught:
            await client.request("POST", "x/", content=b"x" * 10_000_000, params={"key": SECRET}, creates=True)
    assert SECRET not in str(caught.value)


async def test_a_connection_refused_is_surely_nothing_sent() -> None:
    port = free_port()
    async with client_of(f"http://127.0.0.1:{port}/") as client:
        with pytest.raises(Transient, match=rf"^cannot connect to 127\.0\.0\.1:{port}: .+") as caught:
            await client.request("POST", "x/", json={}, creates=True)
    assert caught.value.code == "cannot_connect"


async def test_a_name_that_nobody_knows_is_surely_nothing_sent() -> None:
    async with client_of("http://nowhere.invalid/") as client:
        with pytest.raises(Transient, match=r"^cannot connect to nowhere\.invalid: .+"):
            await client.request("POST", "x/", json={}, creates=True)


async def test_a_connection_that_is_not_made_in_time_is_surely_nothing_sent() -> None:
    # the kernel finishes a connection to this full backlog never; a packet filter that drops looks the same
    with socket.socket() as listener, contextlib.ExitStack() as others:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            waiting = others.enter_context(socket.socket())
            waiting.setblocking(False)  # noqa: FBT003 - the standard library's signature
            waiting.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        async with client_of(url, connect_seconds=0.2) as client:
            with pytest.raises(Transient, match=r"cannot connect to .*: no connection in time"):
                await client.request("POST", "x/", json={}, params={"key": SECRET}, creates=True)


@pytest.mark.parametrize(
    "status", ["500 Internal Server Error", "502 Bad Gateway", "504 Gateway Timeout", "408 Late"]
)
async def test_a_server_in_trouble_leaves_a_create_unknown_and_a_read_for_later(status: str) -> None:
    answer = says(status, f"<h1>no\r\n\x1b[1m {SECRET}</h1>".encode() + b"x" * 5000, "Retry-After: 7")
    unknown = await failure_of(answer, creates=True)
    assert isinstance(unknown, UnknownOutcome)
    later = await failure_of(answer, method="GET")
    assert isinstance(later, Transient)
    assert unknown.retry_after == later.retry_after == 7
    assert f"/base/path/ answered {status}: <h1>no [1m ***</h1>xxx" in str(unknown)
    assert len(str(unknown)) < 400
    assert str(unknown).isprintable()


async def test_too_many_requests_is_later_even_for_a_create() -> None:
    dates = ("Date: Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After: Wed, 21 Oct 2015 07:30:00 GMT")
    error = await failure_of(says("429 Too Many Requests", b"", *dates), creates=True)
    assert isinstance(error, Transient)
    assert error.retry_after == 120


async def test_a_redirect_names_where_it_leads_and_is_not_followed() -> None:
    server = Server(says("302 Found", b"", f"Location: https://u:p@login.example.org/sso?next={SECRET}"))
    async with server.running() as url, client_of(url) as client:
        with pytest.raises(Misconfigured, match=r"to https://login\.example\.org/sso; is NX_TEST_URL right\?$"):
            await client.request("POST", "x", json={}, creates=True)
    assert len(server.requests) == 1


async def test_statuses_for_the_caller_are_handed_back() -> None:
    numbers = itertools.cycle(["201 Created", "400 Bad Request", "404 Not Found", "500 Oops", "503 Oops"])

    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        await says(next(numbers), b'{"a": "\xc2\xb5"}')(request, writer)

    async with Server(answer).running() as url, client_of(url) as client:
        for status in (201, 400, 404, 500, 503):
            answered = await client.request("POST", "x/", json={}, creates=True, pass_through={500, 503})
            assert answered.status_code == status
            assert client.json_of(answered) == {"a": "µ"}


async def test_an_answer_that_is_no_json_is_a_broken_one() -> None:
    async with Server(says("201 Created", b"<html>\n")).running() as url, client_of(url) as client:
        answered = await client.request("POST", "x/", json={}, creates=True)
        with pytest.raises(UnknownOutcome, match=r"answered 201 with no JSON: <html>$"):
            client.json_of(answered, creates=True)
        with pytest.raises(Transient):
            client.json_of(answered)


async def test_a_compressed_answer_is_read() -> None:
    body = gzip.compress(b'{"a": 1}')
    async with Server(says("200 OK", body, "Content-Encoding: gzip")).running() as url, client_of(url) as client:
        assert client.json_of(await client.request("GET", "x/")) == {"a": 1}


@pytest.mark.parametrize("packed", [False, True])
async def test_an_answer_without_end_is_a_broken_one(*, packed: bool) -> None:
    body = gzip.compress(b"x" * 2_000_000) if packed else b"x" * 1_001
    headers = ["Content-Encoding: gzip"] if packed else []
    server = Server(says("201 Created", body, *headers))
    async with server.running() as url, client_of(url, max_body_bytes=1_000) as client:
        with pytest.raises(UnknownOutcome, match="longer than 1000 bytes"):
            await client.request("POST", "x/", json={}, creates=True)


async def test_an_attempt_that_is_over_sends_nothing_more() -> None:
    """A process that was stopped goes on in the middle of an attempt that somebody else has taken over."""
    server = Server(says("200 OK"))
    async with server.running() as url, client_of(url) as client:
        for connected in (False, True):
            mark = no_request_after.set(time.monotonic())
            with pytest.raises(Transient, match="the attempt's time was over"):
                await client.request("POST", "path/", json={"a": 1}, creates=True)
            assert len(server.requests) == connected
            no_request_after.reset(mark)
            await client.request("POST", "path/", json={"a": 1}, creates=True)


async def test_connections_are_kept_and_cookies_are_not() -> None:
    server = Server(says("200 OK", b"{}", "Set-Cookie: sessionid=1; Path=/"))
    async with server.running() as url, client_of(url.replace("127.0.0.1", "localhost")) as client:
        for _ in range(3):
            await client.request("GET", "x/")
    assert server.connections == 1
    assert "cookie" not in "".join(server.requests).lower()
    assert "authorization: token s3cret-token" in server.requests[0].lower()


async def test_a_connection_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "KEEPALIVE_SECONDS", 0.1)
    server = Server(says("201 Created", b"{}"))
    async with server.running() as url, client_of(url) as client:
        await client.request("POST", "x/", json={}, creates=True)
        await asyncio.sleep(0.2)
        await client.request("POST", "x/", json={}, creates=True)
    assert server.connections == 2


async def test_sixty_four_at_once_each_get_a_connection() -> None:
    async def answer(request: str, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.1)
        await says("201 Created", b"{}")(request, writer)

    server = Server(answer)
    async with server.running() as url, client_of(url) as client:
        await asyncio.gather(*(client.request("POST", "x/", json={}, creates=True) for _ in range(64)))
    assert server.connections == 64


async def test_a_multipart_body_goes_out_with_its_length() -> None:
    server = Server(says("201 Created", b"{}"))
    async with server.running() as url, client_of(url) as client:
        await client.request("POST", "x/", files={"file": ("a.xml", b"<a/>")}, data={"k": "v"}, creates=True)
    assert "<a/>" in server.requests[0]
    assert "content-length: " in server.requests[0].lower()


@pytest.mark.parametrize("kind", ["json", "content", "files"])
async def test_a_large_body_arrives_whole_and_with_its_length(kind: str) -> None:
    text = "".join(f"{number:08}" for number in range(300_000))
    parts: dict[str, Any] = {"json": text, "content": text.encode(), "files": {"file": ("a.xml", text.encode())}}
    server = Server(says("201 Created", b"{}"))
    async with server.running() as url, client_of(url) as client:
        for _ in range(2):
            await client.request("POST", "x/", **{kind: parts[kind]}, creates=True)
    assert all(text in request for request in server.requests)
    assert server.connections == 1
    assert "transfer-encoding" not in server.requests[0][:1000].lower()


async def test_the_environments_proxy_is_used_unless_excepted(monkeypatch: pytest.MonkeyPatch) -> None:
    proxy, direct = Server(says("200 OK", b"1")), Server(says("200 OK", b"2"))
    async with proxy.running() as proxy_url, direct.running() as url:
        monkeypatch.setenv("http_proxy", proxy_url.removesuffix("base/"))
        async with client_of(url) as client:
            assert client.json_of(await client.request("GET", "x/")) == 1
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        async with client_of(url) as client:
            assert client.json_of(await client.request("GET", "x/")) == 2
    assert proxy.requests[0].startswith(f"GET {url}x/ ")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a PEM file with a self-signed certificate for 127.0.0.1 and its key."""
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    command += ["-keyout", str(file), "-out", str(file.with_suffix(".crt"))]
    subprocess.run(command, check=True, capture_output=True)
    certificate = file.with_suffix(".crt").read_text("ascii")
    file.write_text(file.read_text("ascii") + certificate, "ascii")
    return file


@pytest.fixture
async def https(certificate: Path) -> AsyncIterator[str]:
    """Give the address of a server with that certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    async with Server(says("200 OK", b"[]")).running(context) as url:
        yield url


async def test_a_self_signed_certificate_waits_for_a_person(https: str) -> None:
    async with client_of(https) as client:
        with pytest.raises(
            Misconfigured, match=r"certificate of 127\.0.* is not trusted \(self.signed.*_BUNDLE_FILE"
        ):
            await client.request("POST", "x/", json={}, creates=True)


async def test_a_bundle_is_added_to_the_systems_authorities(https: str, certificate: Path) -> None:
    text = certificate.with_suffix(".crt").read_text("ascii")
    for tls in (
        TlsSettings(cert_bundle_file=certificate.with_suffix(".crt")),
        TlsSettings(cert_bundle=text),
        TlsSettings(cert_bundle=text.replace("\n", "\\n")),
    ):
        async with client_of(https, tls) as client:
            assert client.json_of(await client.request("GET", "x/")) == []
        assert tls.context().cert_store_stats()["x509"] == TlsSettings().context().cert_store_stats()["x509"] + 1


async def test_verification_can_be_turned_off_with_one_warning(https: str) -> None:
    with capture_logs() as logs:
        for _ in range(2):
            async with client_of(https, TlsSettings(disable_ssl_verify=True)) as client:
                assert client.json_of(await client.request("GET", "x/")) == []
    assert [entry["event"] for entry in logs] == ["ssl_verification_off"]


async def test_https_to_a_server_without_it_is_surely_nothing_sent() -> None:
    async def refuse(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
    async with server, client_of(url) as client:
        with pytest.raises(Transient, match=r"cannot connect to 127.*SSL") as caught:
            await client.request("POST", "x/", json={}, creates=True)
    assert caught.value.code == "cannot_connect"
