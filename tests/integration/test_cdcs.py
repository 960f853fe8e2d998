"""Exports to a real CDCS: what it stores, what it refuses, and what is known after a lost answer."""

import asyncio
import contextlib
import hashlib
import json
import socket
import struct
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from structlog.testing import capture_logs

from consumer.destinations.cdcs import Cdcs
from consumer.destinations.cdcs_rules import record_title
from consumer.destinations.contract import Absent, ExportContext, ExportResult, LastExport, Partial, Present, Unsure
from consumer.errors import Misconfigured, Permanent, Transient, UnknownOutcome
from tools.records import make_record
from tools.servers.cdcs import CdcsServer
from tools.servers.ports import free_port

JSON = "application/json"
TEMPLATES = "/rest/template-version-manager/global/"


class Between:
    """A proxy that counts requests, answers some of them itself, and can reset instead of passing an answer on.

    Every request goes to the server whole, on a connection of its own, and its answer is awaited to the end.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.requests: list[str] = []
        self.reset_after: set[str] = set()
        self.canned: dict[str, deque[bytes]] = {}
        self._tasks: list[asyncio.Task[Any]] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """Serve until the end of the block, and give the address."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**24)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
            async with asyncio.timeout(5):
                await asyncio.gather(*self._tasks)

    def answer(self, request: str, status: str, body: object, *headers: str) -> None:
        """Answer the next such request ("POST /rest/data/") from here, with JSON or with HTML."""
        text, kind = (body, "text/html") if isinstance(body, str) else (json.dumps(body), JSON)
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {kind}", "Connection: close", *headers]
        raw = "\r\n".join([*lines, f"Content-Length: {len(text.encode())}", "", text]).encode()
        self.canned.setdefault(request, deque()).append(raw)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks += filter(None, [asyncio.current_task()])
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode().split("\r\n")
            length = next((int(line[15:]) for line in lines if line.lower().startswith("content-length:")), 0)
            body = await reader.readexactly(length)
            request = first.partition("?")[0].removesuffix(" HTTP/1.1")
            self.requests.append(request)
            waiting = self.canned.get(request)
            answer = waiting.popleft() if waiting else await self._pass_on(head, body)
            if request in self.reset_after:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            else:
                writer.write(answer)
            writer.close()
            await writer.wait_closed()

    async def _pass_on(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        lines = [line for line in head.split(b"\r\n") if line and not line.lower().startswith(b"connection:")]
        writer.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]) + body)
        answer = await reader.read(-1)
        writer.close()
        await writer.wait_closed()
        return answer


@dataclass
class Reservation:
    """The part of a reservation that CDCS cares for."""

    username: str | None
    user_email: str | None = None
    user_first_name: str | None = "Ada"
    user_last_name: str | None = "Lovelace"


MakeDestination = Callable[..., Cdcs]
MakeContext = Callable[..., ExportContext]


@pytest.fixture
async def rest(cdcs: CdcsServer) -> AsyncIterator[httpx.AsyncClient]:
    """Give an administrator's client that knows nothing of the code under test."""
    headers = {"Authorization": f"Token {cdcs.admin_token}"}
    async with httpx.AsyncClient(base_url=cdcs.url, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture
async def make(cdcs: CdcsServer) -> AsyncIterator[MakeDestination]:
    """Give a function that makes destinations, with an administrator's token unless another is given."""
    made: list[Cdcs] = []

    def destination(**settings: Any) -> Cdcs:
        token = SecretStr(settings.pop("token", cdcs.admin_token))
        made.append(Cdcs(Cdcs.Settings(token=token, **{"url": cdcs.url, **settings})))
        return made[-1]

    yield destination
    for item in made:
        await item.aclose()


@pytest.fixture
async def between(cdcs: CdcsServer) -> AsyncIterator[tuple[Between, str]]:
    """Give a proxy before the server, and its address."""
    proxy = Between(cdcs.port)
    async with proxy.running() as url:
        yield proxy, url


@pytest.fixture
def context_of(tmp_path: Path) -> MakeContext:
    """Give a function that makes the context of a record; its file name is new unless one is given."""

    def context(
        index: int = 1, *, stem: str | None = None, content: bytes | None = None, **more: Any
    ) -> ExportContext:
        record = make_record(index, size=2_000)
        path = tmp_path / f"{stem or uuid.uuid4().hex}.xml"
        path.write_bytes(content or record.content)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        more = {"sent_hashes": frozenset({sha256}), **more}
        return ExportContext(
            path, record.session, record.instrument_pid, record.dt_from, record.dt_to, record_sha256=sha256, **more
        )

    return context


def rebuilt(context: ExportContext, result: ExportResult, index: int = 2, **changes: Any) -> ExportContext:
    """Return the context of a newer build of the record that was exported with a result."""
    sha256 = context.record_sha256
    context.xml_file_path.write_bytes(make_record(index, size=3_000).content)
    new = hashlib.sha256(context.xml_file_path.read_bytes()).hexdigest()
    last = LastExport(result.record_id or "", result.record_url, sha256, sha256)
    values = {"record_sha256": new, "last_export": last, "sent_hashes": frozenset({sha256, new}), **changes}
    return replace(context, **values)


async def stored(rest: httpx.AsyncClient, record_id: str | None) -> dict[str, Any]:
    answer = await rest.get(f"rest/data/{record_id}/")
    assert answer.status_code == 200
    value: dict[str, Any] = answer.json()
    return value


async def titled(rest: httpx.AsyncClient, title: str) -> list[dict[str, Any]]:
    """List all records with a title, whoever owns them."""
    value: list[dict[str, Any]] = (await rest.get("rest/admin/data/", params={"title": title})).json()
    return value


async def upload(rest: httpx.AsyncClient, title: str, content: str) -> str:
    template = (await rest.get(TEMPLATES[1:], params={"title": "Nexus Experiment Schema"})).json()[0]["current"]
    answer = await rest.post("rest/data/", json={"title": title, "template": template, "xml_content": content})
    assert answer.status_code == 201
    return str(answer.json()["id"])


async def test_a_record_arrives_byte_for_byte(
    cdcs: CdcsServer, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    content = b"\xef\xbb\xbf" + make_record(1, size=54_000).content.replace(b"\n", b"\r\n") + "<!-- 𝄞 -->".encode()
    context = context_of(content=content)
    result = await make().export(context)
    assert result.success
    assert result.action == "created"
    assert result.record_url == f"{cdcs.url}data?id={result.record_id}"
    assert (await rest.get(result.record_url)).status_code == 200
    record = await stored(rest, result.record_id)
    assert record["xml_content"].encode() == content
    assert record["title"] == context.xml_file_path.stem
    assert record["workspace"] == 1
    named = (await rest.get(TEMPLATES[1:], params={"title": "Nexus Experiment Schema"})).json()
    assert str(record["template"]) == named[0]["current"]


async def test_a_large_record_arrives_byte_for_byte(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    content = make_record(1, size=3_000_000).content
    result = await make().export(context_of(content=content))
    assert (await stored(rest, result.record_id))["xml_content"].encode() == content


async def test_the_address_may_end_without_a_slash(
    cdcs: CdcsServer, make: MakeDestination, context_of: MakeContext
) -> None:
    result = await make(url=cdcs.url.rstrip("/")).export(context_of())
    assert result.record_url == f"{cdcs.url}data?id={result.record_id}"


async def test_one_request_a_record_once_things_are_known(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination = make(url=url)
    await destination.export(context_of())
    assert proxy.requests == [f"GET {TEMPLATES}", "GET /rest/workspace/read_access/", "POST /rest/data/"]
    del proxy.requests[:]
    await asyncio.gather(*(destination.export(context_of(index)) for index in range(5)))
    assert proxy.requests == ["POST /rest/data/"] * 5


async def test_first_exports_together_look_things_up_once(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination = make(url=url)
    await asyncio.gather(*(destination.export(context_of(index)) for index in range(5)))
    assert sorted(proxy.requests)[:2] == [f"GET {TEMPLATES}", "GET /rest/workspace/read_access/"]
    assert len(proxy.requests) == 7


async def test_a_newer_build_updates_the_same_record(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, first = make(), context_of()
    result = await destination.export(first)
    newer = rebuilt(first, result)
    assert await destination.verify(newer) == Partial(result.record_id or "")
    again = await destination.export(newer)
    assert (again.action, again.record_id, again.record_url) == ("updated", result.record_id, result.record_url)
    assert (await stored(rest, result.record_id))["xml_content"].encode() == newer.xml_file_path.read_bytes()
    assert (await stored(rest, result.record_id))["workspace"] == 1
    assert await destination.verify(newer) == Present(result.record_id or "", result.record_url)
    assert len(await titled(rest, newer.xml_file_path.stem)) == 1


async def test_the_same_bytes_again_are_unchanged(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    result = await destination.export(context)
    del proxy.requests[:]
    again = await destination.export(rebuilt(context, result, index=1, record_sha256=context.record_sha256))
    assert again.action == "updated"  # another size
    context.last_export = LastExport(result.record_id or "", None, None, None)
    unchanged = await destination.export(context)
    assert (unchanged.action, unchanged.record_id) == ("unchanged", result.record_id)
    assert [request.partition(" ")[0] for request in proxy.requests] == ["GET", "PATCH", "GET"]


async def test_what_a_person_changed_is_not_written_over(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(), context_of()
    result = await destination.export(context)
    by_hand = make_record(3, size=1_500).content.decode()
    assert (await rest.patch(f"rest/data/{result.record_id}/", json={"xml_content": by_hand})).status_code == 200
    newer = rebuilt(context, result)
    assert await destination.verify(newer) == Partial(result.record_id or "")
    with pytest.raises(
        Permanent, match=rf"data\?id={result.record_id}\); `nexus-export replay --overwrite`"
    ) as caught:
        await destination.export(newer)
    assert caught.value.code == "changed_at_destination"
    assert (await stored(rest, result.record_id))["xml_content"] == by_hand


async def test_what_a_person_deleted_is_not_made_again(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(), context_of()
    result = await destination.export(context)
    assert (await rest.delete(f"rest/data/{result.record_id}/")).status_code == 204
    newer = rebuilt(context, result)
    assert await destination.verify(newer) == Absent()
    with pytest.raises(Permanent, match=f"record {result.record_id} was deleted at CDCS") as caught:
        await destination.export(newer)
    assert caught.value.code == "changed_at_destination"
    assert (await titled(rest, context.xml_file_path.stem)) == []


async def test_a_remembered_record_is_gone_on_with(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(), context_of()
    result = await destination.export(context)
    context.remembered["record_id"] = result.record_id
    again = await destination.export(context)
    assert (again.action, again.record_id) == ("created", result.record_id)
    newer = rebuilt(context, result, last_export=None)
    assert (await destination.export(newer)).action == "updated"
    foreign = rebuilt(context, result, index=4, last_export=None, sent_hashes=frozenset())
    with pytest.raises(Permanent, match="was changed at CDCS"):
        await destination.export(foreign)
    assert len(await titled(rest, context.xml_file_path.stem)) == 1


@pytest.mark.parametrize("stem", ["{}" + "x" * 210, "{}cost$", " {} padded ", "{}ü (Å) #1 & 'b'"])
async def test_any_file_name_becomes_a_title_that_is_found_again(
    stem: str, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(), context_of(stem=stem.format(uuid.uuid4().hex))
    result = await destination.export(context)
    title = record_title(context.xml_file_path.stem)
    assert (await stored(rest, result.record_id))["title"] == title
    assert await destination.verify(context) == Present(result.record_id or "", result.record_url)


async def test_a_wrong_token_waits_for_a_person(make: MakeDestination, context_of: MakeContext) -> None:
    destination, context = make(token="c" * 40), context_of()
    with pytest.raises(Misconfigured, match=r"^Could not authenticate to CDCS.*NX_CDCS_TOKEN.*Invalid token"):
        await destination.export(context)
    with pytest.raises(Misconfigured, match="NX_CDCS_TOKEN"):
        await destination.verify(context)
    valid, message = await destination.validate_config()
    assert not valid
    assert (message or "").startswith("CDCS authentication failed: ")
    assert "cccc" not in (message or "")


async def test_a_token_that_is_withdrawn_later_waits_for_a_person(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    result = await destination.export(context)
    refusal = {"detail": "Invalid token."}
    proxy.answer("POST /rest/data/", "403 Forbidden", refusal)
    proxy.answer("POST /rest/data/", "401 Unauthorized", refusal)
    proxy.answer(f"GET /rest/data/{result.record_id}/", "403 Forbidden", refusal)
    for new in (context_of(), context_of(), rebuilt(context, result)):
        with pytest.raises(Misconfigured, match="Could not authenticate to CDCS"):
            await destination.export(new)


async def test_a_missing_template_waits_for_a_person(make: MakeDestination, context_of: MakeContext) -> None:
    destination = make(template_title="Nothing")
    expected = (
        r"'Nothing' in use; there are: 'Another Schema', 'Nexus Experiment Schema'\. Set NX_CDCS_TEMPLATE_TITLE"
    )
    with pytest.raises(Misconfigured, match=expected):
        await destination.export(context_of())
    valid, message = await destination.validate_config()
    assert not valid
    assert "CDCS configuration error: CDCS has no schema titled 'Nothing'" in (message or "")


async def test_a_working_configuration_is_valid(make: MakeDestination) -> None:
    assert await make().validate_config() == (True, None)
    with capture_logs() as logs:
        assert await make(user_owned_records=True).validate_config() == (True, None)
    assert [entry["event"] for entry in logs] == ["superuser_token_needed"]


async def test_an_address_that_is_no_cdcs_is_told(
    cdcs: CdcsServer, make: MakeDestination, context_of: MakeContext
) -> None:
    destination = make(url=cdcs.url + "elsewhere")
    valid, message = await destination.validate_config()
    assert not valid
    assert message == f"CDCS answered 404 Not Found at {cdcs.url}elsewhere{TEMPLATES}"
    with pytest.raises(Misconfigured, match="NX_CDCS_URL"):
        await destination.export(context_of())


async def test_a_template_that_was_replaced_is_looked_up_once_more(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    outdated = {"id": 1, "title": "Nexus Experiment Schema", "current": "99999", "versions": ["99999"]}
    proxy.answer(f"GET {TEMPLATES}", "200 OK", [outdated])
    proxy.answer("GET /rest/workspace/read_access/", "200 OK", [{"id": 99999, "is_public": True}])
    result = await make(url=url).export(context_of())
    assert (await stored(rest, result.record_id))["workspace"] == 1
    assert proxy.requests.count("POST /rest/data/") == 2


async def test_without_assignment_a_record_stays_private(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    result = await make(url=url, assign_to_public_workspace=False).export(context_of())
    assert proxy.requests == [f"GET {TEMPLATES}", "POST /rest/data/"]
    assert (await stored(rest, result.record_id))["workspace"] is None


async def test_no_public_workspace_is_no_error(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    proxy.answer("GET /rest/workspace/read_access/", "200 OK", [])
    with capture_logs() as logs:
        result = await make(url=url).export(context_of())
    assert (await stored(rest, result.record_id))["workspace"] is None
    assert [entry["event"] for entry in logs] == ["no_public_workspace"]


async def test_an_ordinary_user_can_export_and_update(
    cdcs: CdcsServer, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(token=cdcs.plain_token), context_of()
    result = await destination.export(context)
    assert (await stored(rest, result.record_id))["workspace"] == 1
    assert (await destination.export(rebuilt(context, result))).action == "updated"


async def test_another_users_record_is_not_changed_without_the_right(
    cdcs: CdcsServer, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of()
    result = await make(assign_to_public_workspace=False).export(context)
    plain, newer = make(token=cdcs.plain_token), rebuilt(context, result)
    with pytest.raises(Permanent, match="may not change this record") as caught:
        await plain.export(newer)
    assert caught.value.code == "not_permitted"
    assert isinstance(await plain.verify(newer), Unsure)
    assert (await stored(rest, result.record_id))["xml_content"].encode() != newer.xml_file_path.read_bytes()


async def test_an_unknown_user_is_created_and_owns_the_record(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination = make(user_owned_records=True)
    kept: dict[str, Any] = {}

    async def save(facts: Any) -> None:
        kept.update(facts)

    name = f"user-{uuid.uuid4().hex[:8]}"
    reservation = Reservation(name, f"{name}@example.org")
    # together, so that both find no user
    contexts = [context_of(index, reservation_event=reservation, save_facts=save) for index in (1, 2)]
    results = await asyncio.gather(*(destination.export(context) for context in contexts))
    users = [user for user in (await rest.get("rest/user/")).json() if user["username"] == name]
    assert [user["email"] for user in users] == [f"{name}@example.org"]
    for result in results:
        assert (result.success, result.metadata) == (True, {})
        assert (await stored(rest, result.record_id))["user_id"] == str(users[0]["id"])
    assert kept["record_id"] in {result.record_id for result in results}
    assert await destination.verify(contexts[0]) == Present(results[0].record_id or "", results[0].record_url)


async def test_a_known_user_is_found_by_address(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    reservation = Reservation("plain@university", "PLAIN@example.org")
    result = await make(user_owned_records=True).export(context_of(reservation_event=reservation))
    plain = next(user for user in (await rest.get("rest/user/")).json() if user["username"] == "plain")
    assert (await stored(rest, result.record_id))["user_id"] == str(plain["id"])


@pytest.mark.parametrize(
    ("reservation", "admin", "reason"),
    [
        (None, True, "no reservation with a username"),
        (Reservation(None), True, "no reservation with a username"),
        (Reservation("somebody"), False, "do not have permission"),
        (Reservation("not a valid name!"), True, "did not create the user"),
    ],
)
async def test_a_record_without_its_owner_is_exported_all_the_same(
    cdcs: CdcsServer,
    rest: httpx.AsyncClient,
    make: MakeDestination,
    context_of: MakeContext,
    *,
    reservation: Reservation | None,
    reason: str,
    admin: bool,
) -> None:
    destination = make(user_owned_records=True, token=cdcs.admin_token if admin else cdcs.plain_token)
    with capture_logs() as logs:
        result = await destination.export(context_of(reservation_event=reservation))
    assert result.success
    assert reason in result.metadata["ownership"]
    assert [entry["event"] for entry in logs] == ["ownership_not_changed"]
    assert (await stored(rest, result.record_id))["user_id"] in {"1", "2"}


VALID = make_record(1, size=2_000).content
INVALID = VALID.replace(b"<summary>", b"<nonsense/><summary>", 1)
INFINITE = VALID.replace(b"</id>", b"--><id>1e999</id>", 1).replace(b"<id>", b"<!--", 1)
ENTITY = b'<!DOCTYPE a [<!ENTITY e "x">]>' + VALID.partition(b"?>")[2]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (INVALID, "rejected"),
        (INFINITE, "rejected"),
        (ENTITY, "rejected"),
        (b"<a/>", "rejected"),
        (b"<a>", "rejected"),
        (b" ", "rejected"),
        (b'<?xml version="1.0" encoding="UTF-16"?><a/>', "record_encoding"),
        ("<a>µ</a>".encode("latin-1"), "record_encoding"),
    ],
)
async def test_a_record_that_cdcs_refuses_has_failed_for_good(
    content: bytes, code: str, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of(content=content)
    with pytest.raises(Permanent) as caught:
        await make().export(context)
    assert caught.value.code == code
    if code == "rejected":
        assert str(caught.value).startswith("CDCS upload failed: {")
    assert (await titled(rest, context.xml_file_path.stem)) == []


async def test_an_update_that_cdcs_refuses_has_failed_for_good(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(), context_of()
    result = await destination.export(context)
    newer = rebuilt(context, result)
    newer.xml_file_path.write_bytes(INVALID)
    with pytest.raises(Permanent, match="not expected") as caught:
        await destination.export(newer)
    assert caught.value.code == "rejected"
    assert (
        hashlib.sha256((await stored(rest, result.record_id))["xml_content"].encode()).hexdigest()
        == context.record_sha256
    )


async def test_a_server_that_is_down_is_asked_again_later(make: MakeDestination, context_of: MakeContext) -> None:
    destination = make(url=f"http://127.0.0.1:{free_port()}/")
    for call in (destination.export, destination.verify):
        with pytest.raises(Transient, match="cannot connect to 127"):
            await call(context_of())
    valid, message = await destination.validate_config()
    assert not valid
    assert (message or "").startswith("CDCS configuration error: cannot connect to ")


async def test_a_record_file_that_is_gone_is_told(make: MakeDestination, context_of: MakeContext) -> None:
    context = context_of()
    context.xml_file_path.unlink()
    with pytest.raises(Transient, match=r"cannot be read: No such file"):
        await make().export(context)


async def test_an_answer_lost_after_the_commit_is_found_again(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    proxy.reset_after.add("POST /rest/data/")
    with pytest.raises(UnknownOutcome, match=r"POST .*no complete answer"):
        await destination.export(context)
    answer = await destination.verify(context)
    (record,) = await titled(rest, context.xml_file_path.stem)
    assert answer == Present(str(record["id"]), f"{url}data?id={record['id']}")


async def test_an_update_whose_answer_is_lost_is_found_again(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    result = await destination.export(context)
    proxy.reset_after.add(f"PATCH /rest/data/{result.record_id}/")
    newer = rebuilt(context, result)
    with pytest.raises(UnknownOutcome):
        await destination.export(newer)
    assert await destination.verify(newer) == Present(result.record_id or "", result.record_url)


BROKEN: list[tuple[str, object, str]] = [
    ("500 Internal Server Error", {"message": "server closed the connection unexpectedly"}, "unexpectedly"),
    ("500 Internal Server Error", "<h1>Server Error (500)</h1>", "Server Error"),
    ("502 Bad Gateway", "<h1>Bad Gateway</h1>", "Bad Gateway"),
    ("200 OK", "<h1>Please log in</h1>", "log in"),
    ("201 Created", "{", "no JSON"),
    ("201 Created", {"title": "x"}, "did not say which"),
]


@pytest.mark.parametrize(("status", "body", "reason"), BROKEN)
async def test_an_answer_that_says_nothing_leaves_the_outcome_unknown(
    between: tuple[Between, str],
    make: MakeDestination,
    context_of: MakeContext,
    *,
    status: str,
    body: object,
    reason: str,
) -> None:
    proxy, url = between
    proxy.answer("POST /rest/data/", status, body, "Retry-After: 9")
    with pytest.raises(UnknownOutcome, match=reason) as caught:
        await make(url=url).export(context_of())
    if status.startswith("5"):
        assert caught.value.retry_after == 9


async def test_a_missing_right_to_create_waits_for_a_person(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    message = {"message": "The user doesn't have enough rights to publish."}
    for status in ("500 Internal Server Error", "403 Forbidden"):
        proxy.answer("POST /rest/data/", status, message)
        with pytest.raises(Misconfigured, match=r"may not create records: .*enough rights"):
            await make(url=url).export(context_of())


@pytest.mark.parametrize(
    ("status", "error"),
    [("413 Content Too Large", Permanent), ("429 Too Many Requests", Transient), ("404 Not Found", Misconfigured)],
)
async def test_other_refusals_of_a_create(
    status: str,
    error: type[Exception],
    between: tuple[Between, str],
    make: MakeDestination,
    context_of: MakeContext,
) -> None:
    proxy, url = between
    proxy.answer("POST /rest/data/", status, "<h1>No</h1>")
    with pytest.raises(error):
        await make(url=url).export(context_of())


async def test_a_record_that_nobody_sent_is_absent(make: MakeDestination, context_of: MakeContext) -> None:
    assert await make().verify(context_of()) == Absent()


async def test_an_earlier_build_of_ours_is_a_part(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of()
    content = make_record(5, size=2_000).content
    earlier = await upload(rest, context.xml_file_path.stem, content.decode())
    context.sent_hashes |= {hashlib.sha256(content).hexdigest()}
    assert await make().verify(context) == Partial(earlier)


async def test_a_record_of_somebody_else_with_the_title_is_a_conflict(
    cdcs: CdcsServer, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of()
    foreign = await upload(rest, context.xml_file_path.stem, make_record(6, size=2_000).content.decode())
    with pytest.raises(Permanent, match=rf"{cdcs.url}data\?id={foreign} has the title") as caught:
        await make().verify(context)
    assert caught.value.code == "conflict"


async def test_of_two_equal_copies_the_first_counts_and_the_other_is_reported(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of()
    content = context.xml_file_path.read_text()
    first, second = [await upload(rest, context.xml_file_path.stem, content) for _ in range(2)]
    assert await make().verify(context) == Present(first, f"{rest.base_url}data?id={first}", (second,))


async def test_the_last_look_up_keeps_the_copy_that_the_outcome_names(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of(purpose="recheck")
    content = context.xml_file_path.read_text()
    late, named = [await upload(rest, context.xml_file_path.stem, content) for _ in range(2)]
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    context.last_export = LastExport(named, None, sha256, sha256)
    assert await make().verify(context) == Present(named, f"{rest.base_url}data?id={named}", (late,))


async def test_a_copy_made_with_an_older_schema_version_is_found(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    context = context_of()
    first = await upload(rest, context.xml_file_path.stem, context.xml_file_path.read_text())
    template = (await rest.get(TEMPLATES[1:], params={"title": "Nexus Experiment Schema"})).json()[0]
    newer = {**template, "current": "99999", "versions": [*template["versions"], "99999"]}
    proxy.answer(f"GET {TEMPLATES}", "200 OK", [newer])
    assert await make(url=url).verify(context) == Present(first, f"{url}data?id={first}")


async def test_a_look_up_that_fails_answers_nothing(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, query = make(url=url), "POST /rest/data/query/"
    proxy.answer(query, "400 Bad Request", {"message": "Number of documents is over the limit."})
    assert isinstance(await destination.verify(context_of()), Unsure)
    proxy.answer(query, "500 Internal Server Error", {"message": "database is locked"})
    proxy.answer(query, "200 OK", {"count": 0})
    for _ in range(2):
        with pytest.raises(Transient):
            await destination.verify(context_of())
