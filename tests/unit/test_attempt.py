"""One attempt: whatever a plugin does, its ending is a value that can be stored, and nothing runs late."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from consumer.destinations.contract import (
    Absent,
    ExportContext,
    ExportResult,
    LastExport,
    Partial,
    Present,
    Unsure,
)
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient, UnknownOutcome
from consumer.events import DestinationResult
from consumer.pipeline.attempt import (
    Caller,
    Declined,
    LeaseLostError,
    LeaseTooShortError,
    build_context,
    record_key,
    step_result,
    storable,
)
from consumer.store.rows import Claim, CopyRow, StepState
from tests.unit.builders import NOW, SHA, built, claim, job_row, registered, step_row

LONE = "\ud800"
CONTEXT = ExportContext(Path("a.xml"), "s", "titan", NOW, NOW)
GOOD = ExportResult(success=True, destination_name="cdcs", record_id="17")


class Plugin:
    """A destination that does what a test says: functions are called, exceptions raised, the rest returned."""

    name = "cdcs"
    priority = 100
    enabled = True

    def __init__(self, export: Any = GOOD, verify: Any = None, valid: Any = (True, None), **more: Any) -> None:
        self._acts = {"export": export, "verify": verify, "valid": valid, **more}
        self.calls: list[str] = []
        if "accepts" in more:
            self.accepts = lambda context: self._act("accepts", context)

    def _act(self, name: str, *arguments: Any) -> Any:
        self.calls.append(name)
        act = self._acts[name]
        if isinstance(act, BaseException):
            raise act
        return act(*arguments) if callable(act) else act

    def export(self, context: ExportContext) -> Any:
        """Do what the test says."""
        return self._act("export", context)

    def verify(self, context: ExportContext) -> Any:
        """Do what the test says."""
        return self._act("verify", context)

    def validate_config(self) -> Any:
        """Do what the test says."""
        return self._act("valid")


class AsyncPlugin(Plugin):
    """The same, in coroutines."""

    async def export(self, context: ExportContext) -> Any:
        """Do what the test says."""
        return await self._later("export", context)

    async def verify(self, context: ExportContext) -> Any:
        """Do what the test says."""
        return await self._later("verify", context)

    async def validate_config(self) -> Any:
        """Do what the test says."""
        return await self._later("valid")

    async def _later(self, name: str, *arguments: Any) -> Any:
        found = self._act(name, *arguments)
        return await found if asyncio.iscoroutine(found) else found


BOTH = pytest.mark.parametrize("kind", [Plugin, AsyncPlugin])
Kind = type[Plugin]


@asynccontextmanager
async def calling(plugin: Plugin, **lane: Any) -> AsyncIterator[Caller]:
    caller = Caller(registered(plugin, **lane))
    try:
        yield caller
    finally:
        caller.close()


async def exported(plugin: Plugin, **lane: Any) -> Any:
    async with calling(plugin, **lane) as caller:
        return await caller.export(CONTEXT)


async def verified(plugin: Plugin, **lane: Any) -> Any:
    async with calling(plugin, **lane) as caller:
        return await caller.verify(CONTEXT)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Give an event that hanging threads wait for; it is set when the test is over."""
    event = threading.Event()
    yield event
    event.set()


def ended(ending: Any, kind: type[DestinationError], code: str, message: str) -> None:
    assert type(ending) is kind, ending
    assert (ending.code, str(ending)) == (code, message)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - a thread gives no event to this loop
            await asyncio.sleep(0.005)


# --- results -----------------------------------------------------------------------------------------------------


@BOTH
async def test_a_result_is_passed_on(kind: Kind) -> None:
    full = ExportResult(
        success=True, destination_name="cdcs", record_id="17", record_url="https://cdcs.test/17", timestamp=NOW,
        metadata={"a": [1]}, action="unchanged", stored_sha256=SHA,
    )  # fmt: skip
    assert await exported(kind(full)) == full
    failed = ExportResult(success=False, destination_name="cdcs", error_message="no", timestamp=NOW)
    assert await exported(kind(failed)) == failed


async def test_a_plain_function_may_return_an_awaitable() -> None:
    async def later() -> ExportResult:
        return GOOD

    assert (await exported(Plugin(lambda _context: later()))).record_id == "17"


async def test_a_plain_plugin_runs_in_a_thread_of_its_own() -> None:
    names: list[str] = []

    def note(_context: ExportContext) -> ExportResult:
        names.append(threading.current_thread().name)
        return GOOD

    await exported(Plugin(note))
    assert names[0].startswith("cdcs")


@dataclass
class OldResult:
    """The result object of a plugin that was written for NexusLIMS; it imports nothing of ours."""

    success: Any
    destination_name: str = "whatever"
    record_id: Any = None
    record_url: Any = None
    error_message: Any = None
    metadata: Any = None


@BOTH
async def test_the_result_of_a_nexuslims_plugin_is_taken(kind: Kind) -> None:
    found = await exported(kind(OldResult(success=True, record_id=17, record_url="u", metadata={"a": 1})))
    assert isinstance(found, ExportResult)
    assert (found.success, found.destination_name, found.record_id, found.record_url) == (True, "cdcs", "17", "u")
    assert found.metadata == {"a": 1}
    assert datetime.now(UTC) - found.timestamp < timedelta(seconds=60)
    found = await exported(kind(OldResult(success=False, error_message=ValueError("no"))))
    assert (found.success, found.error_message) == (False, "no")


class Unreadable:
    """An object that cannot even be written as text."""

    def __str__(self) -> str:
        message = "no"
        raise RuntimeError(message)


@pytest.mark.parametrize(
    ("metadata", "kept"),
    [
        (None, {}),
        ([1, 2], {}),
        ({"path": Path("/a"), "set": {1}, "odd": object}, {"path": "/a", "set": [1], "odd": "<class 'object'>"}),
        ({"nan": float("nan"), 7: "key"}, {"nan": None, "7": "key"}),
        ({"nul": "a\0b"}, {"nul": "a\0b"}),
        ({"lone": LONE}, {"unreadable": "PydanticSerializationError"}),
        ({"bad": Unreadable()}, {"unreadable": "PydanticSerializationError"}),
    ],
)
async def test_any_metadata_becomes_what_json_can_hold(metadata: Any, kept: dict[str, Any]) -> None:
    found = await exported(Plugin(OldResult(success=True, metadata=metadata)))
    assert found.metadata == kept
    json.dumps(found.metadata, allow_nan=False)


async def test_a_result_with_wrong_fields_can_still_be_stored() -> None:
    """It says that a record has arrived: that must not be lost for a number where a text belongs."""
    values: dict[str, Any] = {
        "success": 1, "record_id": 17, "record_url": f"u\0{LONE}", "timestamp": "today", "action": "made",
        "stored_sha256": 3, "metadata": {"set": {1}},
    }  # fmt: skip
    odd = ExportResult(destination_name="x", **values)
    found = await exported(Plugin(odd))
    assert (found.success, found.record_id, found.record_url) == (True, "17", "u\N{REPLACEMENT CHARACTER}?")
    assert (found.action, found.stored_sha256) == (None, "3")
    stored = step_result(found, claim())
    DestinationResult.model_validate({"destination": "cdcs", "success": True, **stored})
    assert stored["action"] == "created"


async def test_a_time_without_a_zone_is_local() -> None:
    moment = NOW.astimezone().replace(tzinfo=None)
    stored = step_result(replace(GOOD, timestamp=moment), claim())
    assert datetime.fromisoformat(stored["timestamp"]) == NOW


@pytest.mark.parametrize("wrong", [None, True, "17", {"success": True}, (True, None), 7])
@BOTH
async def test_what_is_no_result_leaves_the_outcome_unknown(kind: Kind, wrong: Any) -> None:
    message = f"export returned {type(wrong).__name__} instead of an ExportResult"
    ended(await exported(kind(wrong)), UnknownOutcome, "bad_result", message)


# --- what is raised ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        Transient("full", retry_after=3),
        Permanent("no", code="rejected"),
        UnknownOutcome("cut"),
        Misconfigured("401"),
        DestinationError("odd"),
    ],
    ids=lambda error: type(error).__name__,
)
@BOTH
async def test_an_error_of_ours_is_passed_on(kind: Kind, error: DestinationError) -> None:
    code, message = error.code, str(error)
    found = await exported(kind(error))
    assert found is error
    ended(found, type(error), code, message)
    assert getattr(found, "retry_after", None) == getattr(error, "retry_after", None)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no"), "ValueError: no"),
        (KeyError("x"), "KeyError: 'x'"),
        (ConnectionResetError("reset"), "ConnectionResetError: reset"),
        (SystemExit(3), "SystemExit: 3"),
        (ValueError("a\0b" + LONE), "ValueError: a\N{REPLACEMENT CHARACTER}b?"),
    ],
    ids=range(5),
)
@BOTH
async def test_after_any_other_error_the_outcome_is_unknown(kind: Kind, error: BaseException, message: str) -> None:
    ended(await exported(kind(error)), UnknownOutcome, "plugin_error", message)


@BOTH
async def test_stop_iteration_is_an_error_like_any_other(kind: Kind) -> None:
    """No future can carry it: it would never be done, and its slot lost for ever."""
    async with calling(kind(StopIteration("end"))) as caller:
        found = await caller.export(CONTEXT)
        assert isinstance(found, UnknownOutcome)
        assert found.code == "plugin_error"
        assert not caller.hung


@pytest.mark.parametrize("error", [ConnectionRefusedError("refused"), socket.gaierror(-2, "no such name")])
@BOTH
async def test_what_never_connected_is_tried_again(kind: Kind, error: OSError) -> None:
    ended(await exported(kind(error)), Transient, "cannot_connect", f"{type(error).__name__}: {error}")


@pytest.mark.parametrize("code", ["x" * 100, 404, f"a\0{LONE}"])
async def test_any_code_fits_into_the_store(code: Any) -> None:
    found = await exported(Plugin(Permanent(f"no\0{LONE}", code=code)))
    assert isinstance(found.code, str)
    assert len(found.code) <= 64
    assert "\0" not in found.code + str(found)
    (found.code + str(found)).encode()


@BOTH
async def test_a_lost_lease_passes(kind: Kind) -> None:
    with pytest.raises(LeaseLostError):
        await exported(kind(LeaseLostError()))
    with pytest.raises(LeaseLostError):
        await verified(kind(verify=LeaseLostError()))


@BOTH
async def test_an_attempt_begins_only_when_all_of_it_fits_in_the_lease(kind: Kind) -> None:
    plugin = kind(GOOD, verify=Absent())
    async with calling(plugin) as caller:
        limit = caller.destination.lane.timeout_seconds
        with pytest.raises(LeaseTooShortError):
            await caller.export(CONTEXT, held_until=time.monotonic() + limit - 0.1)
        with pytest.raises(LeaseTooShortError):
            await caller.verify(CONTEXT, held_until=time.monotonic() + limit - 0.1)
        assert not plugin.calls
        await caller.export(CONTEXT, held_until=time.monotonic() + limit + 60)
        assert plugin.calls


@BOTH
async def test_a_cancelled_attempt_passes(kind: Kind, released: threading.Event) -> None:
    hang: Any = (lambda _context: released.wait()) if kind is Plugin else (lambda _context: asyncio.sleep(60))
    async with calling(kind(hang)) as caller:
        task = asyncio.create_task(caller.export(CONTEXT))
        await until(lambda: bool(caller.destination.plugin.calls))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


def test_storable() -> None:
    assert storable(None) is None
    assert storable("") == ""
    assert storable("ä\N{GRINNING FACE}") == "ä\N{GRINNING FACE}"
    assert storable(17) == "17"


# --- time limits -------------------------------------------------------------------------------------------------


@BOTH
async def test_an_attempt_past_its_limit_is_of_unknown_outcome(kind: Kind, released: threading.Event) -> None:
    hang: Any = (lambda _context: released.wait()) if kind is Plugin else (lambda _context: asyncio.sleep(60))
    started = time.monotonic()
    ended(await exported(kind(hang), timeout_seconds=0.05), UnknownOutcome, "timeout", "no answer within 0.05 s")
    assert time.monotonic() - started < 2


async def test_a_hanging_thread_keeps_its_slot_until_it_ends(released: threading.Event) -> None:
    async with calling(Plugin(lambda _context: released.wait()), timeout_seconds=0.05) as caller:
        for count in (1, 2):
            ended(await caller.export(CONTEXT), UnknownOutcome, "timeout", "no answer within 0.05 s")
            assert len(caller.hung) == count
        released.set()
        await until(lambda: not caller.hung)


async def test_a_hanging_thread_that_fails_late_gives_its_slot_back(released: threading.Event) -> None:
    def fail(_context: ExportContext) -> None:
        released.wait()
        message = "late"
        raise ValueError(message)

    async with calling(Plugin(fail), timeout_seconds=0.05) as caller:
        await caller.export(CONTEXT)
        assert len(caller.hung) == 1
        released.set()
        await until(lambda: not caller.hung)


async def test_what_found_no_thread_in_time_never_runs(released: threading.Event) -> None:
    """It would run when a thread is free again: outside of its lease, and perhaps as a second copy."""
    plugin = Plugin(GOOD, valid=lambda: released.wait())  # noqa: PLW0108 - a name of its own reads worse
    async with calling(plugin, concurrency=1, timeout_seconds=0.05) as caller:
        assert await caller.validate() == "no answer within 0.05 s"
        ended(await caller.export(CONTEXT), Transient, "busy", "no thread was free for it")
        assert len(caller.hung) == 1, "only the one that really runs"
        released.set()
        await until(lambda: not caller.hung)
        await asyncio.sleep(0.05)
        assert plugin.calls == ["valid"]
        assert isinstance(await caller.export(CONTEXT), ExportResult), "and the thread is free again"


async def test_one_limit_holds_for_accepts_and_export_together() -> None:
    """The lease is made for one time limit."""

    def slow(_context: ExportContext) -> bool:
        time.sleep(0.3)
        return True

    plugin = AsyncPlugin(lambda _context: asyncio.sleep(60), accepts=slow)
    started = time.monotonic()
    found = await exported(plugin, timeout_seconds=0.4)
    assert (found.code, plugin.calls) == ("timeout", ["accepts", "export"])
    assert time.monotonic() - started < 0.65


# --- accepts -----------------------------------------------------------------------------------------------------


@BOTH
async def test_a_destination_may_decline_a_record(kind: Kind) -> None:
    plugin = kind(accepts=False)
    assert await exported(plugin) == Declined()
    assert plugin.calls == ["accepts"]
    plugin = kind(accepts=True)
    assert (await exported(plugin)).success
    assert plugin.calls == ["accepts", "export"]


@BOTH
async def test_accepts_that_raises_does_not_export(kind: Kind) -> None:
    plugin = kind(accepts=Transient("busy"))
    ended(await exported(plugin), Transient, "transient", "busy")
    assert plugin.calls == ["accepts"]


# --- look-ups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [Present("17", "https://cdcs.test/17"), Present("17"), Partial("17"), Absent(), Unsure("a login page")],
    ids=repr,
)
@BOTH
async def test_an_answer_is_passed_on(kind: Kind, answer: Any) -> None:
    assert await verified(kind(verify=answer)) == answer


@pytest.mark.parametrize(
    ("answer", "taken"),
    [
        (Present(17, 18), Present("17", "18")),  # type: ignore[arg-type]
        (Partial(17), Partial("17")),  # type: ignore[arg-type]
        (Unsure(None), Unsure("")),  # type: ignore[arg-type]
        (Unsure("a\0"), Unsure("a\N{REPLACEMENT CHARACTER}")),
        (None, Unsure("verify returned NoneType")),
        (True, Unsure("verify returned bool")),
        (Absent, Unsure("verify returned type")),
    ],
)
async def test_an_answer_in_another_form_is_never_taken_for_absent(answer: Any, taken: Any) -> None:
    assert await verified(AsyncPlugin(verify=lambda _context: answer)) == taken


@BOTH
async def test_a_look_up_that_raises(kind: Kind) -> None:
    error = Misconfigured("401")
    assert await verified(kind(verify=error)) is error
    assert await verified(kind(verify=ValueError("no"))) == Unsure("ValueError: no")
    assert await verified(kind(verify=SystemExit(1))) == Unsure("SystemExit: 1")


@BOTH
async def test_a_look_up_past_its_limit_is_unsure(kind: Kind, released: threading.Event) -> None:
    hang: Any = (lambda _context: released.wait()) if kind is Plugin else (lambda _context: asyncio.sleep(60))
    assert await verified(kind(verify=hang), timeout_seconds=0.05) == Unsure("no answer within 0.05 s")


# --- validate_config ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((True, None), None),
        ((False, "NX_CDCS_TOKEN not configured"), "NX_CDCS_TOKEN not configured"),
        ((False, None), "validate_config said no without a reason"),
        ((False, ""), "validate_config said no without a reason"),
        ((False, "a\0"), "a\N{REPLACEMENT CHARACTER}"),
        (True, None),
        (None, "validate_config said no without a reason"),
        (ValueError("no"), "ValueError: no"),
        (SystemExit(1), "SystemExit: 1"),
        (Misconfigured("401"), "Misconfigured: 401"),
    ],
    ids=range(10),
)
@BOTH
async def test_validate(kind: Kind, answer: Any, problem: str | None) -> None:
    async with calling(kind(valid=answer)) as caller:
        assert await caller.validate() == problem


# --- the context -------------------------------------------------------------------------------------------------


async def keep(_claim: Claim, _facts: Mapping[str, Any]) -> None:
    """Keep nothing."""


def context(one: Claim, roots: tuple[Path | None, Path | None] = (None, None)) -> ExportContext:
    return build_context(one, Path("/spool/titan.xml"), keep, frozenset({SHA}), roots)


def test_a_context_holds_what_the_event_says() -> None:
    event = built(
        {
            "user": "ada",
            "instrument_pid": "titan",
            "dt_from": "2026-11-24T09:00:00Z",
            "metadata": {"a": 1},
            "reservation": {"username": "ada"},
        }
    )
    found = context(claim(job=job_row(event, facts={"user": "bob", "dt_to": NOW.isoformat()})))
    assert found.xml_file_path == Path("/spool/titan.xml")
    assert (found.session_identifier, found.user, found.instrument_pid) == ("session-1", "ada", "titan")
    assert (found.dt_from, found.dt_to) == (datetime(2026, 11, 24, 9, tzinfo=UTC), NOW)
    assert found.metadata == {"a": 1}
    assert found.reservation_event.username == "ada"
    assert found.record_sha256 == SHA
    assert found.sent_hashes == {SHA}
    assert (found.purpose, found.last_export, found.remembered) == ("create", None, {})


def test_a_context_of_an_event_that_says_little() -> None:
    found = context(claim())
    assert (found.user, found.instrument_pid, found.activities) == (None, "unknown", [])
    assert found.dt_from == found.dt_to == datetime(2026, 11, 24, 11, tzinfo=UTC), "the build's time"


def test_a_context_of_an_update() -> None:
    copy = CopyRow("17", "https://cdcs.test/17", "s", "t", NOW, {"page": 3})
    found = context(claim(copy=copy))
    assert found.purpose == "update"
    assert found.last_export == LastExport("17", "https://cdcs.test/17", "s", "t")
    assert found.remembered == {"page": 3}


def test_the_key_of_a_copy_is_the_same_for_ever() -> None:
    assert context(claim()).record_key == record_key("session-1", "cdcs") == "13ca1d0d-53a4-5658-9a76-bbf9b53bf7e8"
    assert len({record_key(s, d) for s in ("a", "b") for d in ("cdcs", "elabftw")}) == 4


def test_earlier_results_are_seen() -> None:
    stored = {"record_id": "17", "record_url": "u", "timestamp": NOW.isoformat(), "metadata": {"a": 1}}
    siblings = (
        step_row("done", StepState.DONE, result=stored),
        step_row("failed", StepState.FAILED, reason="no", result={**stored, "record_id": "x"}),
        step_row("retrying", StepState.DUE, reason="full", result={"next_action": "none"}, first_attempt_at=NOW),
        step_row("skipped", StepState.SKIPPED),
        step_row("waiting", StepState.BLOCKED),
        step_row("running", StepState.RUNNING),
    )
    found = context(claim(siblings=siblings))
    assert set(found.previous_results) == {"done", "failed", "retrying", "skipped"}
    assert found.get_result("done") == ExportResult(
        success=True, destination_name="done", record_id="17", record_url="u", timestamp=NOW, metadata={"a": 1}
    )
    assert found.has_successful_export("done")
    failed = found.get_result("failed")
    assert failed is not None
    assert (failed.success, failed.record_id, failed.error_message) == (False, None, "no")
    assert not found.has_successful_export("failed")
    assert not found.has_successful_export("waiting")
    assert found.get_result("skipped") is not None


async def test_remember_is_kept_before_it_returns() -> None:
    saved: list[dict[str, Any]] = []

    async def save(_claim: Claim, facts: Mapping[str, Any]) -> None:
        saved.append(dict(facts))

    one = claim(copy=CopyRow(remembered={"page": 3}))
    found = build_context(one, Path("x"), save, frozenset(), (None, None))
    await found.remember(entry="7")
    await found.remember(page=4)
    assert saved == [{"page": 3, "entry": "7"}, {"page": 4, "entry": "7"}]
    assert found.remembered == {"page": 4, "entry": "7"}
    assert one.copy.remembered == {"page": 3}, "what was read stays as it was"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "previews").mkdir(parents=True)
    (folder / "previews" / "a.png").write_bytes(b"png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    return folder


def previews(root: Path | None, *names: str | None) -> tuple[Path | None, ...]:
    job = job_row(built({"activities": [{"previews": list(names)}]}))
    (activity,) = context(claim(job=job), (None, root)).activities
    found: tuple[Path | None, ...] = activity.previews
    return found


def test_previews_are_files_below_their_root(data: Path) -> None:
    assert previews(data, "previews/a.png", None, "./previews/a.png") == (
        data / "previews" / "a.png", None, data / "previews" / "a.png",
    )  # fmt: skip


def test_no_preview_leads_out(data: Path) -> None:
    """The same rules as for records: no link, no way up, no absolute path."""
    (data / "link.png").symlink_to(data.parent / "secret.png")
    (data / "inner.png").symlink_to(data / "previews" / "a.png")
    (data / "folder").symlink_to(data.parent)
    names = (
        "link.png", "inner.png", "folder/secret.png", "../secret.png", "previews/../previews/a.png",
        str(data / "previews" / "a.png"), "previews", "gone.png", "", ".", "x" * 300, "y/" * 3000 + "z",
    )  # fmt: skip
    assert previews(data, *names) == (None,) * len(names)
    assert previews(None, "previews/a.png") == (None,)


def test_files_of_an_activity_are_only_named(tmp_path: Path) -> None:
    activity = {"files": ["titan/a.dm3"], "start": "2026-11-24T09:00:00Z", "setup": {"kV": 200}}
    job = job_row(built({"activities": [activity]}))
    (found,) = context(claim(job=job), (tmp_path, None)).activities
    assert found.files == (f"{tmp_path}/titan/a.dm3",)
    assert (found.start, found.end) == (datetime(2026, 11, 24, 9, tzinfo=UTC), None)
    assert found.setup_params == {"kV": 200}
    (found,) = context(claim(job=job)).activities
    assert found.files == ("titan/a.dm3",)
