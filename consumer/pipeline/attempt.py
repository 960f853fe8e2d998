"""One attempt at one destination: builds the context, calls the plugin within its time, names the ending.

This is the only place that runs plugin code while records are on their way.
"""

import asyncio
import hashlib
import inspect
import math
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from pydantic_core import from_json, to_json

from consumer.destinations.contract import (
    Absent,
    Action,
    Answer,
    ExportContext,
    ExportResult,
    LastExport,
    Partial,
    Present,
    Unsure,
    at_once,
    no_request_after,
    request_turn,
)
from consumer.destinations.registry import Registered
from consumer.errors import DestinationError, RecordRefused, Transient, UnknownOutcome
from consumer.events import Activity, DestinationResult, job_id, restore_built
from consumer.pipeline.files import safe_parts
from consumer.pipeline.retry import Ending
from consumer.store.rows import Claim, StepRow, StepState
from consumer.telemetry import get_logger

#: Longest ``code`` of an error that the store takes.
CODE_LENGTH = 64
#: Longest digest that it takes.
DIGEST_LENGTH = 64

_log = get_logger()

Save = Callable[[Claim, Mapping[str, Any]], Awaitable[None]]


class LeaseLostError(Exception):
    """Another process has taken the step over: nothing of this attempt may be written any more."""


class LeaseTooShortError(Exception):
    """Too little of the lease is left for a whole attempt: the destination was not called."""


@dataclass(frozen=True, slots=True)
class Declined:
    """The destination does not want this record (``accepts`` said no)."""


class Caller:
    """Calls one destination's plugin; plain functions run in threads of their own."""

    def __init__(self, destination: Registered, turn: Callable[[], Awaitable[None]] = at_once) -> None:
        self.destination = destination
        self._turn = turn
        self._threads = ThreadPoolExecutor(
            max_workers=destination.lane.concurrency, thread_name_prefix=destination.name
        )
        #: threads that outlived their attempt: they keep their slot until they end
        self.hung: set[asyncio.Future[Any]] = set()

    def close(self) -> None:
        """Give the threads up; one that hangs cannot be stopped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def export(self, context: ExportContext, held_until: float = math.inf) -> Ending | Declined:
        """Run ``accepts`` and ``export``; every ending is a value, ``CancelledError`` passes.

        ``held_until`` is the end of the lease in seconds of the monotonic clock. Raises ``LeaseTooShortError``.
        """
        accepts = getattr(self.destination.plugin, "accepts", None)
        ends_at = self._ends_at(held_until)  # one time limit for both, since the lease holds no longer
        try:
            if accepts is not None and not await self._call(ends_at, accepts, context):
                return Declined()
            result = await self._call(ends_at, self.destination.plugin.export, context)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a foreign plugin may raise anything
            return self._ending(error)
        if all(hasattr(result, name) for name in ("success", "record_id", "record_url", "error_message")):
            return _converted(result, self.destination.name)
        return UnknownOutcome(
            f"export returned {type(result).__name__} instead of an ExportResult", code="bad_result"
        )

    async def verify(self, context: ExportContext, held_until: float = math.inf) -> Answer | DestinationError:
        """Ask whether the record is there; every failure to answer is ``Unsure`` or an error value.

        Raises ``LeaseTooShortError`` as ``export`` does.
        """
        ends_at = self._ends_at(held_until)
        try:
            answer = await self._call(ends_at, self.destination.plugin.verify, context)
        except DestinationError as error:
            return _storable_error(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a foreign plugin may raise anything
            self._raise_if_lost(error)
            return Unsure(self._described(error))
        if isinstance(answer, Present):
            surplus = tuple(storable(str(copy)) or "" for copy in answer.surplus)
            return Present(storable(answer.id) or "", storable(answer.url), surplus)
        if isinstance(answer, Partial):
            return Partial(storable(answer.id) or "")
        if isinstance(answer, Unsure):
            return Unsure(storable(answer.reason) or "")
        return answer if isinstance(answer, Absent) else Unsure(f"verify returned {type(answer).__name__}")

    async def validate(self) -> str | None:
        """Run ``validate_config``; returns what is wrong, or None."""
        try:
            answer = await self._call(self._ends_at(), self.destination.plugin.validate_config)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a foreign plugin may raise anything
            return self._described(error)
        valid, message = answer if isinstance(answer, tuple) and len(answer) == 2 else (bool(answer), None)  # noqa: PLR2004
        return None if valid else storable(message or "validate_config said no without a reason")

    def _ends_at(self, held_until: float = math.inf) -> float:
        ends_at = time.monotonic() + self.destination.lane.timeout_seconds
        if ends_at > held_until:
            raise LeaseTooShortError
        return ends_at

    async def _call(self, ends_at: float, function: Callable[..., Any], *arguments: Any) -> Any:
        no_request_after.set(ends_at)
        request_turn.set(self._turn)
        if inspect.iscoroutinefunction(function):
            async with asyncio.timeout_at(ends_at):
                return await function(*arguments)
        work = self._threads.submit(_in_thread, function, arguments)
        future = asyncio.wrap_future(work)
        left = ends_at - time.monotonic()
        done, _ = await asyncio.wait({future}, timeout=max(0.0, left))
        if not done:
            if work.cancel():  # else it would run late, outside of its lease
                raise Transient("no thread was free for it", code="busy")
            self.hung.add(future)
            future.add_done_callback(self._ended_late)
            raise TimeoutError
        result = future.result()
        if inspect.isawaitable(result):
            async with asyncio.timeout_at(ends_at):
                return await result
        return result

    def _ended_late(self, future: asyncio.Future[Any]) -> None:
        self.hung.discard(future)
        if not future.cancelled() and future.exception() is not None:
            _log.info("late_attempt_ended", destination=self.destination.name, error=str(future.exception()))

    def _ending(self, error: BaseException) -> Ending:
        self._raise_if_lost(error)
        if isinstance(error, DestinationError):
            return _storable_error(error)
        text = self._described(error)
        if isinstance(error, TimeoutError):
            return UnknownOutcome(text, code="timeout")
        if isinstance(error, ConnectionRefusedError | socket.gaierror):
            return Transient(text, code="cannot_connect")
        # whatever it was, a request may have left before it
        return UnknownOutcome(text, code="plugin_error")

    def _described(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            return f"no answer within {self.destination.lane.timeout_seconds:g} s"
        return storable(f"{type(error).__name__}: {error}") or ""

    @staticmethod
    def _raise_if_lost(error: BaseException) -> None:
        if isinstance(error, LeaseLostError):
            raise error


def _in_thread(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call a plain function; a StopIteration cannot pass a future, which would then never be done."""
    try:
        return function(*arguments)
    except StopIteration as error:
        message = f"StopIteration: {error}"
        raise RuntimeError(message) from error


def storable(value: Any) -> str | None:
    """Return a plugin's value as text that every database and event can hold: no NUL, no lone surrogates."""
    if value is None:
        return None
    return str(value).replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()


def _storable_error(error: DestinationError) -> DestinationError:
    error.args = (storable(error),)
    error.code = (storable(error.code) or "")[:CODE_LENGTH]
    return error


def _converted(result: Any, name: str) -> ExportResult:
    """Take what a plugin returned as the store and the outcome can hold it; it may be written for NexusLIMS."""
    action, timestamp = getattr(result, "action", None), getattr(result, "timestamp", None)
    return ExportResult(
        success=bool(result.success),
        destination_name=name,
        record_id=storable(result.record_id),
        record_url=storable(result.record_url),
        error_message=storable(result.error_message),
        timestamp=timestamp if isinstance(timestamp, datetime) else datetime.now(UTC),
        metadata=_json_object(getattr(result, "metadata", None)),
        action=action if action in get_args(Action) else None,
        stored_sha256=_digest(getattr(result, "stored_sha256", None)),
    )


def _digest(value: Any) -> str | None:
    """Return a digest as the store can hold it; a longer name of it is told apart just as well by its own digest."""
    text = storable(value)
    return text if text is None or len(text) <= DIGEST_LENGTH else hashlib.sha256(text.encode()).hexdigest()


def _json_object(value: Any) -> dict[str, Any]:
    try:
        found = from_json(to_json(value, fallback=str, inf_nan_mode="null"))
    except Exception as error:  # noqa: BLE001 - a foreign object may raise anything where it is read
        return {"unreadable": type(error).__name__}
    return found if isinstance(found, dict) else {}


def build_context(
    claim: Claim, xml_path: Path, save: Save, hashes: frozenset[str], data_roots: tuple[Path | None, Path | None]
) -> ExportContext:
    """Collect what a destination may know of the record; ``data_roots``: instrument data, previews."""
    event = restore_built(claim.job.event)
    data, known, copy = event.data, claim.job.facts, claim.copy
    last = None
    if copy.record_id is not None:
        last = LastExport(copy.record_id, copy.record_url, copy.sent_sha256, copy.stored_sha256)
    remembered = dict(copy.remembered)

    async def save_facts(_facts: Mapping[str, Any]) -> None:
        await save(claim, remembered)

    return ExportContext(
        xml_file_path=xml_path,
        session_identifier=claim.job.session,
        instrument_pid=data.instrument_pid or known.get("instrument_pid") or "unknown",
        dt_from=data.dt_from or _moment(known.get("dt_from")) or claim.job.build_time,
        dt_to=data.dt_to or _moment(known.get("dt_to")) or claim.job.build_time,
        user=data.user or known.get("user"),
        metadata=dict(data.metadata),
        previous_results={
            s.destination: _previous(s) for s in claim.siblings if s.result or s.outcome_state.terminal
        },
        activities=[_activity(activity, data_roots) for activity in data.activities],
        reservation_event=data.reservation,
        record_key=record_key(claim.job.session, claim.step.destination),
        record_sha256=claim.job.record_sha256 or "",
        purpose=claim.step.purpose if claim.step.links else "update" if last else "create",
        links=dict(claim.links),
        last_export=last,
        remembered=remembered,
        save_facts=save_facts,
        sent_hashes=hashes,
    )


def record_key(session: str, destination: str) -> str:
    """Name the copy of a session at a destination, the same for ever."""
    return str(job_id(f"urn:nexus-export:copy:{destination}", session))


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _previous(step: StepRow) -> ExportResult:
    known = step.result or {}
    done = step.outcome_state is StepState.DONE
    return ExportResult(
        success=done,
        destination_name=step.destination,
        record_id=known.get("record_id") if done else None,
        record_url=known.get("record_url") if done else None,
        error_message=None if done else (step.reason or str(step.state)),
        timestamp=_moment(known.get("timestamp")) or step.first_attempt_at or datetime.now().astimezone(),
        metadata=known.get("metadata") or {},
    )


@dataclass(frozen=True, slots=True)
class ContextActivity:
    """An activity as plugins see it; paths are absolute, a preview that may not be opened is None.

    ``relative_files`` are the same files as the event named them, below ``NX_INSTRUMENT_DATA_PATH``.
    """

    files: tuple[str, ...]
    relative_files: tuple[str, ...]
    previews: tuple[Path | None, ...]
    start: datetime | None
    end: datetime | None
    setup_params: dict[str, Any]


def _activity(activity: Activity, data_roots: tuple[Path | None, Path | None]) -> ContextActivity:
    instrument_root, preview_root = data_roots
    return ContextActivity(
        files=tuple(str(instrument_root / name) if instrument_root else name for name in activity.files),
        relative_files=tuple(activity.files),
        previews=tuple(_below(preview_root, name) for name in activity.previews),
        start=activity.start,
        end=activity.end,
        setup_params=dict(activity.setup),
    )


def _below(root: Path | None, name: str | None) -> Path | None:
    """Return a preview's path if it is a real file inside its root, else None with a warning."""
    if root is None or not name:
        return None
    path = root
    try:
        for part in safe_parts(name):
            path /= part
            if path.is_symlink():
                break
        else:
            if path.is_file():
                return path
    except (RecordRefused, OSError):
        pass
    _log.warning("preview_skipped", preview=name, reason="missing, a link, or not inside NX_DATA_PATH")
    return None


def step_result(ending: ExportResult, claim: Claim) -> dict[str, Any]:
    """Return what is stored of a success: the result that listeners get."""
    action = ending.action or ("updated" if claim.copy.record_id is not None else "created")
    return stored_result(
        claim, ending.timestamp, action=action, record_id=ending.record_id, record_url=ending.record_url,
        metadata=ending.metadata,
    )  # fmt: skip


def stored_result(claim: Claim, at: datetime, **values: Any) -> dict[str, Any]:
    """Return a result as a JSON object; its shape is checked by the event model."""
    aware = at if at.tzinfo else at.astimezone()
    model = DestinationResult(destination=claim.step.destination, success=True, timestamp=aware, **values)
    return model.model_dump(mode="json", include={"action", "record_id", "record_url", "metadata", "timestamp"})
