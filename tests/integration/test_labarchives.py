"""Exports to the LabArchives test server in a process of its own, read back by the official client ``labapi``."""

import asyncio
import hashlib
import io
import json
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import labapi
import pytest
from labapi.entry import AttachmentEntry, TextEntry
from pydantic import SecretStr
from structlog.testing import capture_logs

from consumer.destinations.contract import (
    Absent,
    ExportContext,
    ExportResult,
    LastExport,
    Partial,
    Present,
    Unsure,
    no_request_after,
    request_turn,
)
from consumer.destinations.http import HttpClient, TlsSettings
from consumer.destinations.labarchives import LabArchives
from consumer.destinations.labarchives_client import LabArchivesClient
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient, UnknownOutcome
from consumer.testing.labarchives_api import KEY_ID, PASSWORD
from consumer.testing.labarchives_server import LOGIN, NOTEBOOK, TOKEN, UID
from tests.integration.harness import PROJECT, built, by_path, site
from tools.records import make_record
from tools.servers.ports import free_port
from tools.servers.process import Child, clean_environment, wait_for

OTHER_UID = "7771|ada"
KEY = "0b9d2f1e-7c3a-5d44-9a10-5b7f3c2d1e00"
HEX = KEY.replace("-", "")
CDCS = "https://cdcs.example.org/data?id=17"
SECRETS = (PASSWORD, KEY_ID, UID, "sig=", "Ho%27s", "Beckman1")


class Server(Child):
    """The test server and its control interface."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "consumer.testing.labarchives_server", "--port", str(self.port)]
        super().__init__(
            [*command, "--user", OTHER_UID, "--ledger", folder / "ledger.jsonl"],
            env=clean_environment(PYTHONPATH=str(PROJECT)),
            log=folder / "labarchives.log",
            cwd=folder,
        )
        self.wait_until(self._answers, 15, "the LabArchives test server")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.address}/control/ledger").status_code == 200
        except httpx.TransportError:
            return False

    def control(self, verb: str, what: str, /, **body: Any) -> Any:
        """Use the control interface."""
        answer = httpx.request(verb, f"{self.address}/control/{what}", json=body or None)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def fault(self, method: str, **more: Any) -> None:
        """Let the next request of a method go wrong."""
        self.control("POST", "faults", method=method, **more)

    def options(self, **options: Any) -> None:
        """Change how the server answers."""
        self.control("PATCH", "options", **options)

    def folder(self, name: str, parent: str = "0") -> str:
        """Make a folder as another program would."""
        made = self.control("POST", "nodes", notebook=NOTEBOOK, parent=parent, name=name, is_folder=True)
        return str(made["id"])

    @property
    def ledger(self) -> list[dict[str, Any]]:
        """Return all requests."""
        found: list[dict[str, Any]] = self.control("GET", "ledger")["requests"]
        return found

    def methods(self) -> list[str]:
        """Return the methods that were called."""
        return [line["method"] for line in self.ledger]

    def nodes(self, **like: Any) -> list[dict[str, Any]]:
        """Return the nodes with such fields."""
        found = self.control("GET", "state")["nodes"]
        return [node for node in found if like.items() <= node.items()]

    def entries(self, **like: Any) -> list[dict[str, Any]]:
        """Return the entries with such fields."""
        found = self.control("GET", "state")["entries"]
        return [entry for entry in found if like.items() <= entry.items()]

    @property
    def pages(self) -> list[dict[str, Any]]:
        """Return all pages."""
        return self.nodes(is_folder=False)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Give a server for all tests here."""
    server = Server(tmp_path_factory.mktemp("labarchives"))
    yield server
    server.stop(5)


@pytest.fixture
def server(running: Server) -> Server:
    """Give the server with nothing in it."""
    running.control("POST", "reset")
    return running


MakeDestination = Callable[..., LabArchives]


@pytest.fixture
async def make(server: Server) -> AsyncIterator[MakeDestination]:
    """Give a function that makes destinations, without a pace unless one is given."""
    made: list[LabArchives] = []

    def destination(**changes: Any) -> LabArchives:
        settings: dict[str, Any] = {
            "url": f"{server.address}/api/",
            "access_key_id": SecretStr(KEY_ID),
            "access_password": SecretStr(PASSWORD),
            "user_id": SecretStr(UID),
            "notebook_id": NOTEBOOK,
            "min_interval_seconds": 0.0,
            **changes,
        }
        made.append(LabArchives(LabArchives.Settings(**settings)))
        return made[-1]

    yield destination
    for item in made:
        await item.aclose()


@dataclass
class Memory:
    """What the engine keeps of a copy between attempts."""

    facts: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def context_of(tmp_path: Path) -> Callable[..., ExportContext]:
    """Give a function that makes the context of a record."""

    def context(index: int = 1, *, memory: Memory | None = None, **more: Any) -> ExportContext:
        record = make_record(index, size=2_000)
        path = tmp_path / record.name
        path.write_bytes(record.content)
        sha256 = hashlib.sha256(record.content).hexdigest()
        facts = memory.facts if memory is not None else {}
        known: dict[str, Any] = {"record_key": KEY, "sent_hashes": frozenset({sha256}), "remembered": dict(facts)}
        known |= {"user": record.user, **more}

        async def save(_facts: Any) -> None:
            facts.update(made.remembered)

        made = ExportContext(
            path, record.session, record.instrument_pid, record.dt_from, record.dt_to,
            record_sha256=sha256, save_facts=save, **known,
        )  # fmt: skip
        return made

    return context


def key_of(number: int) -> str:
    """Return the key of another copy."""
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def last_of(result: ExportResult, context: ExportContext) -> LastExport:
    assert result.record_id is not None
    return LastExport(result.record_id, result.record_url, context.record_sha256, context.record_sha256)


def newer_build(context: ExportContext, result: ExportResult, **more: Any) -> ExportContext:
    """Return the context of a newer build of the same session."""
    content = context.xml_file_path.read_bytes().replace(b"</", b" </", 1)
    path = context.xml_file_path.with_name("newer.xml")
    path.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    more = {"sent_hashes": context.sent_hashes | {sha256}, **more}
    last = last_of(result, context)
    return replace(context, xml_file_path=path, record_sha256=sha256, purpose="update", last_export=last, **more)


def official(server: Server) -> labapi.User:
    """Log the official client in."""
    client = labapi.Client(server.address, KEY_ID, PASSWORD, web_url=server.address)
    return client.login(LOGIN, TOKEN)


# --- create, and read back ---------------------------------------------------------------------------------------


async def test_the_official_client_reads_what_was_created(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    context = context_of(links={"cdcs": CDCS})
    result = await make().export(context)
    assert result.success
    assert result.action == "created"
    notebook = official(server).notebooks["Microscopy"]
    folder = notebook["NexusLIMS Records"][context.instrument_pid]  # type: ignore[index]
    assert len(folder) == 1
    [name] = folder
    assert name == f"{context.dt_from:%Y-%m-%d} — {context.session_identifier} [k:{HEX[:12]}]"
    page = folder[name].as_page()
    assert page.id == result.record_id
    assert result.record_url is not None
    assert result.record_url.startswith(f"{server.address}/")
    assert "=" not in result.record_url, "ids are percent-encoded"
    text, attachment = page.entries
    assert isinstance(text, TextEntry)
    assert isinstance(attachment, AttachmentEntry)
    assert f"Record key: {HEX}" in text.content
    assert CDCS in text.content
    assert attachment.content.read() == context.xml_file_path.read_bytes()
    assert attachment.content.filename == context.xml_file_path.name
    assert attachment.caption == f"NexusLIMS XML record sha256:{context.record_sha256}"
    stored = server.entries(part_type="Attachment")[0]
    assert stored["content_type"] == "application/octet-stream"


async def test_the_server_serves_the_official_client_s_writes_too(server: Server) -> None:
    notebook = official(server).notebooks["Microscopy"]
    page = notebook.dir("by hand").page("a page")
    page.entries.create(TextEntry, "<p>some text</p>")
    page.entries.create(
        AttachmentEntry, labapi.Attachment(io.BytesIO(b"bytes"), "text/plain", "file.txt", "a caption")
    )
    page.refresh()
    text, attachment = page.entries
    assert text.content == "<p>some text</p>"
    assert attachment.content.read() == b"bytes"
    text.content = "<p>other text</p>"
    page.delete()
    assert [node["name"] for node in server.nodes(parent="0")].count("API Deleted Items") == 1


async def test_all_that_was_created_is_found(make: MakeDestination, context_of: Callable[..., ExportContext]) -> None:
    memory = Memory()
    result = await make().export(context_of(memory=memory))
    present = Present(result.record_id or "", result.record_url)
    assert await make().verify(context_of(memory=memory)) == present
    assert await make().verify(context_of()) == present, "by its key alone"
    assert await make().verify(context_of(purpose="recheck")) == present


async def test_a_second_export_changes_nothing(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    context = context_of()
    first = await make().export(context)
    before = server.control("GET", "state")
    again = await make().export(context_of(last_export=last_of(first, context), purpose="update"))
    assert again.action == "unchanged"
    assert again.record_id == first.record_id
    unknowing = await make().export(context_of())
    assert unknowing.record_id == first.record_id
    after = server.control("GET", "state")
    assert sorted(map(str, after["nodes"])) == sorted(map(str, before["nodes"]))
    assert after["entries"] == before["entries"]


async def test_month_folders(server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]) -> None:
    context = context_of()
    result = await make(month_folders=True).export(context)
    [month] = server.nodes(name=f"{context.dt_from:%Y-%m}", is_folder=True)
    assert server.pages[0]["parent"] == month["id"]
    # the setting may change between attempts
    assert await make(month_folders=False).verify(context_of()) == Present(result.record_id or "", result.record_url)
    assert (await make(month_folders=False).export(context_of())).record_id == result.record_id


async def test_a_session_costs_four_requests_once_folders_are_known(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    destination = make()
    await destination.export(context_of(1))
    server.control("DELETE", "ledger")
    other = context_of(2)
    await destination.export(replace(other, instrument_pid=context_of(1).instrument_pid, record_key=KEY[::-1]))
    assert server.methods() == ["get_tree_level", "insert_node", "add_entry", "add_attachment"]


async def test_names_that_are_hard(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    session = "https://nemo.example.org/api/usage_events/?id=31&x=a+b#é🔬 <b>"
    context = replace(context_of(), session_identifier=session, instrument_pid="JEOL — 3010/ä+%&\t=?")
    result = await make().export(context)
    assert server.pages[0]["name"] == f"{context.dt_from:%Y-%m-%d} — {session} [k:{HEX[:12]}]"
    assert len(server.nodes(name="JEOL — 3010/ä+%& =?", is_folder=True)) == 1
    await make().export(replace(context, remembered={}))
    assert len(server.pages) == 1
    assert len(server.nodes(is_folder=True)) == 2
    assert "&lt;b&gt;" in server.entries(part_type="text entry")[0]["data"]
    assert result.record_id == server.pages[0]["id"]


async def test_previews_are_attached(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext], tmp_path: Path
) -> None:
    images = [tmp_path / f"{number}.png" for number in range(4)]
    for number, image in enumerate(images):
        image.write_bytes(b"\x89PNG" + bytes([number]))
    activity = SimpleNamespace(
        files=("/data/a.dm4", "/data/a.dm4", "/data/b.tif", "/data/c.tif"),
        relative_files=("a.dm4", "a.dm4", "b.tif", "c.tif"),
        previews=(images[0], images[1], tmp_path / "missing.png", images[3]),
    )
    context = context_of(activities=[activity])
    result = await make(max_previews=3).export(context)
    captions = [entry["caption"] for entry in server.entries(part_type="Attachment")]
    assert [caption.partition(": ")[0] for caption in captions[1:]] == ["a.dm4 (1 of 2)", "a.dm4 (2 of 2)"]
    assert result.metadata["skipped_previews"] == "2"
    assert isinstance(await make(max_previews=3).verify(context_of(activities=[activity])), Present)
    assert isinstance(await make(max_previews=4).verify(context_of(activities=[activity])), Partial)


async def test_a_large_file_is_refused_before_anything_is_sent(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    server.options(max_file_size=100)
    destination = make()
    for _ in range(2):
        with pytest.raises(Permanent, match="100 in one file") as caught:
            await destination.export(context_of())
        assert caught.value.code == "too_large"
    assert server.methods() == ["max_file_size"], "asked once, and nothing else"


# --- interrupted, and gone on with --------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "skip"), [
    ("insert_node", 0), ("insert_node", 1), ("insert_node", 2), ("add_entry", 0), ("add_attachment", 0),
])  # fmt: skip
@pytest.mark.parametrize("when", ["before", "after"])
async def test_after_every_cut_the_record_is_there_once(
    *,
    server: Server,
    make: MakeDestination,
    context_of: Callable[..., ExportContext],
    method: str,
    skip: int,
    when: str,
) -> None:
    memory = Memory()
    server.fault(method, when=when, what="cut", skip=skip)
    with pytest.raises(UnknownOutcome):
        await make().export(context_of(memory=memory))
    assert server.methods().count(method) == skip + 1, "never sent twice"
    answer = await make().verify(context_of(memory=memory))
    assert isinstance(answer, Absent | Partial | Present)
    if isinstance(answer, Partial):
        memory.facts["record_id"] = answer.id
    if not isinstance(answer, Present):
        await make().export(context_of(memory=memory))
    assert isinstance(await make().verify(context_of(memory=memory)), Present)
    assert len(server.pages) == 1
    assert len(server.entries()) == 2
    assert len(server.nodes(is_folder=True)) == 2


@pytest.mark.parametrize("trouble", [
    {"what": "status", "status": 502}, {"what": "code", "code": 4999}, {"what": "truncate"}, {"what": "odd"},
    {"what": "status", "status": 500, "when": "before"},
])  # fmt: skip
@pytest.mark.parametrize("method", ["insert_node", "add_entry", "add_attachment"])
async def test_an_answer_that_tells_nothing_is_an_unknown_outcome(
    server: Server,
    make: MakeDestination,
    context_of: Callable[..., ExportContext],
    method: str,
    trouble: dict[str, Any],
) -> None:
    server.fault(method, skip=2 if method == "insert_node" else 0, **trouble)
    with pytest.raises(UnknownOutcome) as caught:
        await make().export(context_of())
    assert method in str(caught.value)
    assert not any(secret in str(caught.value) for secret in SECRETS)
    assert server.methods().count(method) == (3 if method == "insert_node" else 1)


@pytest.mark.parametrize("trouble", [
    {"what": "status", "status": 503}, {"what": "code", "code": 4999}, {"what": "truncate"}, {"what": "odd"},
    {"what": "cut"},
])  # fmt: skip
@pytest.mark.parametrize("method", ["get_tree_level", "get_entries_for_page", "user_info_via_id"])
async def test_a_look_up_that_fails_says_nothing(
    server: Server,
    make: MakeDestination,
    context_of: Callable[..., ExportContext],
    method: str,
    trouble: dict[str, Any],
) -> None:
    await make().export(context_of())
    server.fault(method, count=2, **trouble)
    with pytest.raises(Transient):
        await make().verify(context_of())


async def test_a_stalled_answer_is_unknown_and_found(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    server.fault("add_attachment", what="stall", seconds=5)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(make().export(context_of()), 3)
    assert isinstance(await make().verify(context_of()), Present)


async def test_what_is_committed_late_is_found_and_surplus_is_reported(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    server.fault("insert_node", when="late", seconds=3.0, skip=2)
    with pytest.raises(UnknownOutcome):
        await make().export(context_of())
    assert await make().verify(context_of()) == Absent()
    memory = Memory()
    result = await make().export(context_of(memory=memory))  # before the server has settled
    await asyncio.to_thread(wait_for, lambda: len(server.pages) == 2, 15, "the late page")
    [late] = [page["id"] for page in server.pages if page["id"] != result.record_id]
    answer = await make().verify(context_of(memory=memory, purpose="recheck"))
    assert answer == Present(result.record_id or "", result.record_url, (late,))
    # one that knows nothing takes the page with the entries
    assert (await make().export(context_of())).record_id == result.record_id


async def test_a_second_attachment_is_surplus(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    memory = Memory()
    server.fault("add_attachment", when="late", seconds=2.0)
    with pytest.raises(UnknownOutcome):
        await make().export(context_of(memory=memory))
    await make().export(context_of(memory=memory))
    await asyncio.to_thread(wait_for, lambda: len(server.entries()) == 3, 15, "the late attachment")
    answer = await make().verify(context_of(memory=memory, purpose="recheck"))
    ours = memory.facts["entries"]
    [late] = [e["id"] for e in server.entries(part_type="Attachment") if e["id"] not in ours.values()]
    assert isinstance(answer, Present)
    assert answer.surplus == (late,)


async def test_a_record_that_a_person_took_out_of_its_page(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    memory = Memory()
    result = await make().export(context_of(memory=memory))
    text, attachment = server.entries()
    server.control("DELETE", f"entries/{text['id']}")
    assert isinstance(await make().verify(context_of(memory=memory, purpose="recheck")), Present)
    server.control("DELETE", f"entries/{attachment['id']}")
    recheck = context_of(memory=memory, purpose="recheck")
    assert await make().verify(recheck) == Partial(result.record_id or "")


async def test_a_half_stored_attachment_is_sent_again(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    context = context_of()
    page = (await make().export(context)).record_id
    [stored] = server.entries(part_type="Attachment")
    server.control("DELETE", f"entries/{stored['id']}")
    params = {"filename": stored["file_name"], "caption": stored["caption"], "nbid": NOTEBOOK, "pid": page}
    official(server).api_post("entries/add_attachment", io.BytesIO(b"half"), **params)
    assert await make().verify(context_of()) == Partial(page or "")
    await make().export(context_of())
    assert len(server.entries(part_type="Attachment")) == 2
    assert isinstance(await make().verify(context_of()), Present)


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_told(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext], status: int
) -> None:
    server.fault("get_tree_level", what="status", status=status, retry_after="17", when="before")
    with pytest.raises(Transient) as caught:
        await make().export(context_of())
    assert caught.value.retry_after == 17
    assert caught.value.code == ("rate_limited" if status == 429 else "server_error")


# --- newer builds, links, people ----------------------------------------------------------------------------------


async def test_a_newer_build_adds_entries_and_changes_none(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    memory = Memory()
    context = context_of(memory=memory)
    first = await make().export(context)
    before = server.entries()
    official(server).api_post("entries/update_entry", {"entry_data": "<p>my own words</p>"}, eid=before[0]["id"])
    update = newer_build(context, first, remembered=dict(memory.facts))
    assert isinstance(await make().verify(update), Partial)
    second = await make().export(update)
    assert second.action == "updated"
    assert (second.record_id, second.record_url) == (first.record_id, first.record_url)
    entries = server.entries()
    assert len(entries) == 4
    assert entries[0]["data"] == "<p>my own words</p>"
    assert entries[1] == before[1]
    assert entries[3]["content"].encode("latin-1") == update.xml_file_path.read_bytes()
    assert isinstance(await make().verify(update), Present)
    assert server.methods().count("update_entry") == 1, "only the person's"


async def test_a_page_of_nexuslims_is_gone_on_with(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    context = context_of()
    folder = server.folder(context.instrument_pid, server.folder("NexusLIMS Records"))
    page = server.control("POST", "nodes", notebook=NOTEBOOK, parent=folder, name="old", is_folder=False)["id"]
    last = LastExport("the text entry's id", f"https://mynotebook.labarchives.com/#/{NOTEBOOK}/{page}", None, None)
    result = await make().export(replace(context, last_export=last, purpose="update"))
    assert result.record_id == page
    assert len(server.pages) == 1


async def test_a_link_is_added_once(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    memory = Memory()
    context = context_of(memory=memory)
    first = await make().export(context)
    link = context_of(memory=memory, links={"cdcs": CDCS}, purpose="link", last_export=last_of(first, context))
    assert await make().verify(link) == Partial(first.record_id or "")
    result = await make().export(link)
    assert result.action == "linked"
    assert result.record_id == first.record_id
    assert CDCS in server.entries()[2]["data"]
    again = context_of(links={"cdcs": CDCS}, purpose="link", last_export=last_of(first, context))
    assert isinstance(await make().verify(again), Present)
    await make().export(again)
    assert len(server.entries()) == 3
    moved = replace(again, links={"cdcs": CDCS + "8"})
    await make().export(moved)
    assert len(server.entries()) == 4, "another address is another link"


async def test_a_link_that_is_in_the_summary_is_not_added(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    await make().export(context_of(links={"cdcs": CDCS}))
    assert isinstance(await make().verify(context_of(links={"cdcs": CDCS})), Present)
    assert len(server.entries()) == 2


@pytest.mark.parametrize("how", ["renamed", "moved", "put away", "deleted"])
async def test_a_page_that_a_person_took_away(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext], how: str
) -> None:
    memory = Memory()
    context = context_of(memory=memory)
    first = await make().export(context)
    notebook: Any = official(server).notebooks["Microscopy"]
    [page] = notebook.traverse(f"NexusLIMS Records/{context.instrument_pid}").children
    if how == "renamed":
        page.name = "what I call it"
    elif how == "moved":
        page.move_to(page.root.dir("elsewhere"))
    elif how == "put away":
        page.delete()
    else:
        server.control("DELETE", f"nodes/{first.record_id}")
    update = newer_build(context, first, remembered=dict(memory.facts))
    if how == "renamed":
        assert (await make().export(update)).record_id == first.record_id
        return
    assert await make().verify(update) == Absent()
    with pytest.raises(Permanent) as caught:
        await make().export(update)
    assert caught.value.code == "changed_at_destination"
    assert ("API Deleted Items" in str(caught.value)) == (how == "put away")
    assert len(server.entries()) == 2, "nothing was written"


async def test_somebody_else_s_page_with_the_same_short_key(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    await make().export(context_of())
    other = context_of(2, record_key=KEY[:-2] + "ff")
    other = replace(other, instrument_pid=context_of().instrument_pid)
    for work in (make().export, make().verify):
        with pytest.raises(Permanent) as caught:
            await work(other)
        assert caught.value.code == "conflict"
    assert len(server.entries()) == 2


# --- folders ------------------------------------------------------------------------------------------------------


async def test_sessions_at_once_make_one_folder(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    destination = make()
    contexts = [replace(context_of(), record_key=key_of(number)) for number in range(5)]
    await asyncio.gather(*(destination.export(context) for context in contexts))
    assert len(server.nodes(is_folder=True)) == 2
    assert len(server.pages) == 5


async def test_two_processes_that_make_a_folder_each(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    context = context_of()
    mine = await make().export(context)
    [root] = server.nodes(name="NexusLIMS Records")
    twins = [server.folder(context.instrument_pid, root["id"]) for _ in range(3)]
    # whichever is first now, the page in the other is found
    assert await make().verify(context_of()) == Present(mine.record_id or "", mine.record_url)
    await make().export(replace(context_of(), record_key=key_of(7)))
    folders = sorted(node["id"] for node in server.nodes(name=context.instrument_pid))
    assert set(twins) < set(folders)
    assert min(page["parent"] for page in server.pages) in folders
    newest = next(page for page in server.pages if page["id"] != mine.record_id)
    assert newest["parent"] == folders[0]


async def test_two_processes_at_once(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    contexts = [replace(context_of(), record_key=key_of(number)) for number in range(4)]
    results = await asyncio.gather(*(make().export(context) for context in contexts))
    for context, result in zip(contexts, results, strict=True):
        # one that knows no ids finds it, in whichever folder it lies
        assert await make().verify(context) == Present(result.record_id or "", result.record_url)
    assert len(server.pages) == 4


async def test_a_folder_that_was_taken_away_is_made_again(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    destination = make()
    context = context_of()
    await destination.export(context)
    for node in server.nodes():
        server.control("DELETE", f"nodes/{node['id']}")
    await destination.export(replace(context_of(), record_key=key_of(7)))
    assert len(server.pages) == 1
    assert len(server.nodes(is_folder=True)) == 2


async def test_an_empty_list_may_come_as_404(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    server.options(empty_is_404=True)
    assert await make().verify(context_of()) == Absent()
    await make().export(context_of())
    assert isinstance(await make().verify(context_of()), Present)


# --- the inbox ----------------------------------------------------------------------------------------------------


async def test_without_a_notebook_the_inbox_is_used(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    memory = Memory()
    context = context_of(memory=memory)
    result = await make(notebook_id=None).export(context)
    text, attachment = server.entries(page=None, uid=UID)
    assert result.record_id == text["id"]
    assert result.record_url == f"{server.address}/"
    assert attachment["content"].encode("latin-1") == context.xml_file_path.read_bytes()
    assert not any({"nbid", "pid"} & line["params"].keys() for line in server.ledger)
    present = Present(text["id"], result.record_url)
    assert await make(notebook_id=None).verify(context_of(memory=memory)) == present
    assert await make(notebook_id=None).verify(context_of(memory=memory, purpose="recheck")) == present
    last = last_of(result, context)
    again = await make(notebook_id=None).export(context_of(memory=memory, last_export=last, purpose="update"))
    assert again.action == "unchanged"
    link = context_of(memory=memory, last_export=last, purpose="link", links={"cdcs": CDCS})
    assert (await make(notebook_id=None).export(link)).record_id == text["id"]
    assert len(server.entries()) == 3


async def test_nobody_knows_what_is_in_the_inbox(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    memory = Memory()
    server.fault("add_attachment")
    with pytest.raises(UnknownOutcome):
        await make(notebook_id=None).export(context_of(memory=memory))
    answer = await make(notebook_id=None).verify(context_of(memory=memory))
    assert isinstance(answer, Unsure)
    assert HEX in answer.reason
    # a person has looked, and says that it is not there
    await make(notebook_id=None).export(context_of(memory=memory))
    assert len(server.entries(part_type="text entry")) == 1


async def test_an_inbox_entry_that_is_gone(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    memory = Memory()
    result = await make(notebook_id=None).export(context_of(memory=memory))
    server.control("DELETE", f"entries/{result.record_id}")
    assert await make(notebook_id=None).verify(context_of(memory=memory, purpose="recheck")) == Absent()


# --- clock, signature, pace ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [-3600, 3600])
async def test_a_wrong_clock_is_corrected_once(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext], seconds: int
) -> None:
    server.options(clock_offset_seconds=seconds)
    result = await make().export(context_of())
    assert result.success
    assert server.methods().count("epoch_time") == 1
    assert [line["code"] for line in server.ledger].count(4504) == 1
    assert len(server.entries()) == 2


async def test_a_refused_create_goes_out_again_with_the_right_time(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    server.fault("add_entry", when="before", what="code", code=4504)
    await make().export(context_of())
    assert server.methods().count("add_entry") == 2
    assert len(server.entries()) == 2


async def test_a_clock_that_stays_wrong_is_a_persons_matter(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    server.fault("max_file_size", when="before", what="code", code=4504, count=2)
    with pytest.raises(Misconfigured, match="clocks"):
        await make().export(context_of())
    assert server.methods() == ["max_file_size", "epoch_time", "max_file_size"]


async def test_requests_keep_a_second_apart(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    destination = make(min_interval_seconds=1.0)
    await asyncio.gather(destination.export(context_of()), destination.verify(context_of(2)))
    arrived = [line["at"] for line in server.ledger]
    assert len(arrived) >= 8
    # they leave a second apart; on a busy machine the first of two may be longer on its way
    assert arrived[-1] - arrived[0] > len(arrived) - 1.5
    assert min(line["gap_seconds"] for line in server.ledger[1:]) > 0.5


async def test_after_a_failure_the_interval_counts_from_its_end(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    destination = make(min_interval_seconds=0.3)
    server.fault("max_file_size", when="before", what="stall", seconds=0.5)
    with pytest.raises(Transient):
        await destination.export(context_of())
    await destination.export(context_of())
    assert server.ledger[1]["gap_seconds"] > 0.75


async def test_every_request_waits_for_its_turn(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    turns = 0

    async def turn() -> None:
        nonlocal turns
        turns += 1

    token = request_turn.set(turn)
    await make().export(context_of())
    request_turn.reset(token)
    assert turns == len(server.ledger)


async def test_what_the_turn_has_spaced_is_not_spaced_again(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    async def turn() -> None:
        await asyncio.sleep(0.5)

    token = request_turn.set(turn)
    started = time.monotonic()
    await make(min_interval_seconds=0.5).export(context_of())
    request_turn.reset(token)
    assert time.monotonic() - started < 0.75 * len(server.ledger)


async def test_nothing_leaves_after_the_attempt(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext]
) -> None:
    token = no_request_after.set(time.monotonic())
    with pytest.raises(Transient):
        await make().export(context_of())
    no_request_after.reset(token)
    assert server.ledger == []


# --- settings and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["access_key_id", "access_password", "user_id", "url"])
async def test_what_is_not_configured_is_named(
    make: MakeDestination, context_of: Callable[..., ExportContext], missing: str
) -> None:
    destination = make(**{missing: None})
    assert not destination.enabled
    name = f"NX_LABARCHIVES_{missing.upper()}"
    assert await destination.validate_config() == (False, f"{name} not configured")
    with pytest.raises(Misconfigured, match=name):
        await destination.export(context_of())
    with pytest.raises(Misconfigured, match=name):
        await destination.verify(context_of())


@pytest.mark.parametrize(("changes", "named"), [
    ({"access_key_id": SecretStr("other")}, "NX_LABARCHIVES_ACCESS_KEY_ID"),
    ({"access_password": SecretStr("other")}, "NX_LABARCHIVES_ACCESS_PASSWORD"),
    ({"user_id": SecretStr("nobody")}, "NX_LABARCHIVES_USER_ID"),
    ({"notebook_id": "bm9uZQ=="}, "NX_LABARCHIVES_NOTEBOOK_ID"),
])  # fmt: skip
@pytest.mark.parametrize("with_200", [False, True])
@pytest.mark.parametrize("old", [False, True])
async def test_wrong_settings_are_named_and_pause(
    *,
    server: Server,
    make: MakeDestination,
    context_of: Callable[..., ExportContext],
    changes: dict[str, Any],
    named: str,
    with_200: bool,
    old: bool,
) -> None:
    server.options(errors_with_200=with_200, old_errors=old)
    destination = make(**changes)
    valid, message = await destination.validate_config()
    assert not valid
    assert named in (message or "")
    with pytest.raises(Misconfigured, match=named) as caught:
        await destination.export(context_of())
    assert not any(secret in f"{message} {caught.value}" for secret in SECRETS)


async def test_good_settings_are_valid(server: Server, make: MakeDestination) -> None:
    assert await make().validate_config() == (True, None)
    assert await make(notebook_id=None, url=f"{server.address}/").validate_config() == (True, None)


async def test_a_clock_that_differs_is_told(server: Server, make: MakeDestination) -> None:
    server.options(clock_offset_seconds=7200)
    with capture_logs() as logs:
        assert await make().validate_config() == (True, None)
    [told] = [line for line in logs if line["event"] == "clock_differs"]
    assert abs(told["seconds"] - 7200) < 5


async def test_nobody_listens(make: MakeDestination, context_of: Callable[..., ExportContext]) -> None:
    destination = make(url=f"http://127.0.0.1:{free_port()}/api/")
    valid, message = await destination.validate_config()
    assert not valid
    assert "cannot connect" in (message or "")
    with pytest.raises(Transient) as caught:
        await destination.export(context_of())
    assert caught.value.code == "cannot_connect"


async def test_no_labarchives_there(server: Server, make: MakeDestination) -> None:
    valid, message = await make(url=f"{server.address}/api/v2/").validate_config()
    assert not valid
    assert "NX_LABARCHIVES_URL" in (message or "")


@pytest.mark.parametrize(("name", "text"), [
    ("users.csv", f"username,uid\nAda, {OTHER_UID}\n"), ("users.json", json.dumps({"ada": OTHER_UID})),
])  # fmt: skip
async def test_a_record_is_made_with_the_uid_of_its_person(
    *,
    server: Server,
    make: MakeDestination,
    context_of: Callable[..., ExportContext],
    tmp_path: Path,
    name: str,
    text: str,
) -> None:
    users = tmp_path / name
    users.write_text(text)
    memory = Memory()
    result = await make(users_file=users).export(context_of(memory=memory, user="ADA"))
    assert {entry["uid"] for entry in server.entries()} == {OTHER_UID}
    assert "warning" not in result.metadata
    assert OTHER_UID not in str(memory.facts)
    # a record keeps its person, whatever a newer build says
    assert isinstance(await make(users_file=users).verify(context_of(memory=memory, user="other")), Present)
    assert {line["uid"] for line in server.ledger} == {OTHER_UID}


async def test_somebody_without_a_uid_is_warned_of(
    server: Server, make: MakeDestination, context_of: Callable[..., ExportContext], tmp_path: Path
) -> None:
    users = tmp_path / "users.csv"
    users.write_text(f"grace,{OTHER_UID}\n")
    reservation = SimpleNamespace(username="linus")
    result = await make(users_file=users).export(context_of(reservation_event=reservation))
    assert "'linus'" in result.metadata["warning"]
    assert {entry["uid"] for entry in server.entries()} == {UID}


@pytest.mark.parametrize("text", [None, "{", "[]", "ada\n", "ada,\n"])
async def test_a_users_file_that_cannot_be_used(
    make: MakeDestination, context_of: Callable[..., ExportContext], tmp_path: Path, text: str | None
) -> None:
    users = tmp_path / ("users.json" if text in {"{", "[]"} else "users.csv")
    if text is not None:
        users.write_text(text)
    destination = make(users_file=users)
    valid, message = await destination.validate_config()
    assert not valid
    assert "NX_LABARCHIVES_USERS_FILE" in (message or "")
    with pytest.raises(Misconfigured, match="NX_LABARCHIVES_USERS_FILE"):
        await destination.export(context_of())


async def test_secrets_are_in_no_log_and_no_error(
    server: Server,
    make: MakeDestination,
    context_of: Callable[..., ExportContext],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []
    destination = make()
    with capture_logs() as logs:
        await destination.validate_config()
        for trouble in ({"what": "code"}, {"what": "status"}, {"what": "cut"}, {"what": "truncate"}):
            for method in ("add_entry", "get_tree_level", "insert_node"):
                server.fault(method, count=2, **trouble)
                with pytest.raises(DestinationError) as caught:
                    await destination.export(replace(context_of(), record_key=key_of(len(seen))))
                seen += [str(caught.value), repr(caught.value)]
                server.control("DELETE", "faults")
        result = await destination.export(context_of())
    seen += [repr(destination), repr(destination._settings), str(result), str(logs)]  # noqa: SLF001
    seen += [record.getMessage() for record in caplog.records if f":{server.port}/control" not in record.getMessage()]
    for secret in SECRETS:
        assert not [text for text in seen if secret in text]


async def test_a_form_that_is_too_large_is_refused_for_good(server: Server) -> None:
    client = LabArchivesClient(f"{server.address}/api/", TlsSettings(), key_id=KEY_ID, password=PASSWORD)
    with pytest.raises(Permanent) as caught:
        await client.add_text(UID, None, "x" * 1_000_001)
    await client.aclose()
    assert caught.value.code == "too_large"
    assert server.entries() == []


@pytest.mark.parametrize("verb", ["GET", "POST", "PUT", "DELETE"])
async def test_what_changes_something_is_never_sent_twice(verb: str) -> None:
    """Aiohttp by itself sends a GET, PUT or DELETE again when the connection is closed without an answer."""
    seen: list[bytes] = []
    serving: list[asyncio.Task[Any]] = []

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.extend(filter(None, [asyncio.current_task()]))
        line = await reader.readline()
        if line:  # the repeat opens a connection, and sends nothing
            seen.append(line)
        writer.close()
        await writer.wait_closed()

    listener = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with listener:
        address = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/"
        client = HttpClient(address, TlsSettings(), setting="NX_TEST_URL")
        with pytest.raises(UnknownOutcome):
            await client.request(verb, "thing", creates=True)
        await client.aclose()
        await asyncio.wait_for(asyncio.gather(*serving, return_exceptions=True), 5)
    assert len(seen) == 1


# --- through the engine -------------------------------------------------------------------------------------------


def settings_of(server: Server) -> dict[str, str]:
    return {
        "NX_LABARCHIVES_URL": f"{server.address}/api",
        "NX_LABARCHIVES_ACCESS_KEY_ID": KEY_ID,
        "NX_LABARCHIVES_ACCESS_PASSWORD": PASSWORD,
        "NX_LABARCHIVES_USER_ID": UID,
        "NX_LABARCHIVES_NOTEBOOK_ID": NOTEBOOK,
        "NX_LABARCHIVES_MIN_INTERVAL_SECONDS": "0",
        "NX_LABARCHIVES_SETTLE_SECONDS": "1",
        "NX_LOG_LEVEL": "DEBUG",
    }


def test_a_record_through_the_service(server: Server, amqp_url: str, tmp_path: Path) -> None:
    record = make_record(3, size=2_000)
    server.fault("add_attachment")  # its answer is lost
    with site(tmp_path, amqp_url, plugins={}, **settings_of(server)) as (here, bus):
        (here.records / record.name).write_bytes(record.content)
        here.start()
        event = built(record.session, by_path(record.name, record.content))
        bus.publish(event)
        result = bus.outcome(event["id"], seconds=30).result("labarchives")
        assert result["success"], result
        [page] = server.pages
        assert result["record_id"] == page["id"]
        assert len(server.entries()) == 2
        logs = "".join(service.logged() for service in here.running)
        rows = str(here.sql("SELECT * FROM upload_log")) + str(here.sql("SELECT * FROM copies"))
    for secret in SECRETS:
        assert secret not in logs + rows


def test_a_newer_build_through_the_service(server: Server, amqp_url: str, tmp_path: Path) -> None:
    record, newer = make_record(4, size=2_000), make_record(4, size=2_500)
    settings = settings_of(server) | {"NX_LABARCHIVES_MIN_INTERVAL_SECONDS": "0.3"}
    with site(tmp_path, amqp_url, plugins={}, **settings) as (here, bus):
        here.start()
        results = []
        for hour, build in ((10, record), (11, newer)):
            (here.records / f"{hour}.xml").write_bytes(build.content)
            described = by_path(f"{hour}.xml", build.content)
            event = built(record.session, described, time=f"2026-03-01T{hour}:00:00Z")
            bus.publish(event)
            results.append(bus.outcome(event["id"], seconds=30).result("labarchives"))
    assert [result["action"] for result in results] == ["created", "updated"]
    assert results[0]["record_id"] == results[1]["record_id"]
    kept = [entry["content"].encode("latin-1") for entry in server.entries(part_type="Attachment")]
    assert kept == [record.content, newer.content]
    gaps = [line["gap_seconds"] for line in server.ledger[1:]]
    assert min(gaps) > 0.15
    assert sum(gaps) > 0.3 * (len(gaps) - 1)
