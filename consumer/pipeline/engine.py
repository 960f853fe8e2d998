"""The engine: claims due steps (T2), runs them, and writes down what became of them (T4)."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from consumer.destinations.contract import ExportContext, ExportResult, Unsure, at_once
from consumer.destinations.registry import Registered, Registry
from consumer.errors import UnknownOutcome
from consumer.pipeline.attempt import Caller, Declined, LeaseLostError, LeaseTooShortError, build_context
from consumer.pipeline.decide import may_start
from consumer.pipeline.ending import Endings, RetrySettings, of_superseded, skipped
from consumer.pipeline.keeper import Keeper
from consumer.pipeline.lanes import Lane
from consumer.pipeline.links import Links, of_link
from consumer.pipeline.pace import Pace
from consumer.pipeline.progress import Advanced, Progress
from consumer.pipeline.signals import Signals, wait
from consumer.store import jobs, lanes, rechecks, steps
from consumer.store.connection import Connection, Database, DatabaseError
from consumer.store.rows import AttemptEnd, Claim, JobRow
from consumer.store.steps import Wanted
from consumer.telemetry import get_logger

IDLE_SECONDS = 1.0
#: At a stop: how long the last results may take to be written.
LAST_WRITE_SECONDS = 2.0

_log = get_logger()


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the engine needs to know beside the destinations."""

    owner: str
    retry: RetrySettings
    #: a lease outlives the longest attempt by this much: time to write the result down
    lease_margin_seconds: float
    instrument_root: Path | None
    data_root: Path | None


class Engine:
    """Runs due steps; each destination has its own slots, and a step that waits is a row, not a task."""

    def __init__(
        self,
        database: Database,
        registry: Registry,
        progress: Progress,
        signals: Signals,
        *,
        keeper: Keeper,
        settings: EngineSettings,
    ) -> None:
        self._database = database
        self._registry = registry
        self._progress = progress
        self._keeper = keeper
        self._settings = settings
        self._endings = Endings(settings.retry, database.clock)
        self._links = Links.of(registry.enabled)
        self.callers = {name: Caller(item, self._turn_of(item)) for name, item in registry.enabled.items()}
        self.lanes = {
            name: Lane.of(caller, settings.lease_margin_seconds, settings.retry.max_wait_seconds)
            for name, caller in self.callers.items()
        }
        self._running: dict[asyncio.Task[None], Claim] = {}
        self._results: asyncio.Queue[AttemptEnd] = asyncio.Queue()
        self._stopping = False
        self._claimed = asyncio.Event()
        self._stopped = asyncio.Event()
        #: the last claim filled every slot of a destination, so a slot that gets free is worth a claim
        self._hungry = False
        self._signals = signals

    # --- running -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Claim and run steps until ``stop``; results are written as they come, in groups."""
        writer, claiming = asyncio.create_task(self._write_results()), asyncio.create_task(self._claim_and_wait())
        try:
            await asyncio.wait({writer, claiming}, return_when=asyncio.FIRST_COMPLETED)
            if writer.done():  # it never ends by itself: without it every step would stay running
                writer.result()
            await claiming
        finally:
            claiming.cancel()
            # a writer that broke, or a database that is away, must not hold up the stop: recovery knows what is left
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WRITE_SECONDS):
                    await self._results.join()
            writer.cancel()
            await asyncio.wait({writer})
            for caller in self.callers.values():
                caller.close()

    async def _claim_and_wait(self) -> None:
        await self._claim_until_stopped()
        self._claimed.set()
        await self._stopped.wait()  # attempts that end within the grace have results too

    async def _claim_until_stopped(self) -> None:
        while not self._stopping:
            self._signals.steps.clear()
            try:
                claims = await self._claim()
            except DatabaseError as error:
                _log.error("engine_database_away", reason=str(error).splitlines()[0])
                await asyncio.sleep(IDLE_SECONDS)
                continue
            for claim in claims:
                self.lanes[claim.step.destination].begin()
                task = asyncio.create_task(self._run_step(claim))
                self._running[task] = claim
                task.add_done_callback(self._finished)
            if not claims:
                await wait(self._signals.steps, IDLE_SECONDS)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        if self._hungry:
            self._signals.steps.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("attempt_crashed", exc_info=error)

    async def stop(self, grace_seconds: float) -> None:
        """Claim nothing more; give running attempts the grace, then cut them: they become unsettled."""
        self._stopping = True
        self._signals.steps.set()
        ends_at = time.monotonic() + grace_seconds
        await wait(self._claimed, grace_seconds)  # a claim under way still starts what it has taken
        if self._running:
            left = max(0.0, ends_at - time.monotonic())
            _, late = await asyncio.wait(set(self._running), timeout=left)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=2)
        self._stopped.set()

    @property
    def busy(self) -> int:
        """Return how many attempts run now."""
        return len(self._running)

    def _turn_of(self, destination: Registered) -> Callable[[], Awaitable[None]]:
        interval = destination.lane.min_interval_seconds
        if not destination.paces_requests or interval <= 0:
            return at_once
        return Pace(self._database, destination.name, interval).turn

    # --- T2: claiming --------------------------------------------------------------------------------------

    async def _claim(self) -> list[Claim]:
        """Write down which records were kept since the last time, and claim what is due, in one commit."""
        self._hungry = True
        if not any(lane.free for lane in self.lanes.values()) and not self._keeper.ready:
            return []
        claims: list[Claim] = []
        async with self._database.write() as connection:
            # looked at only now: while others wrote, more slots got free and more records were kept
            kept = self._keeper.ready
            asked = time.monotonic()  # before the database's clock: a lease surely lasts as long from here
            now = await self._database.now(connection)
            moved, fresh = await self._keeper.write_kept(connection, kept, now) if kept else (Advanced(), {})
            states = await lanes.load(connection)
            full = False
            for name, lane in self.lanes.items():
                wanted = lane.wanted(states.get(name), now)
                if wanted is not None:
                    taken = await self._claim_lane(connection, wanted, now, fresh)
                    held_until = asked + wanted.lease_seconds
                    claims += [replace(claim, held_until=held_until, probe_of=wanted.probe_of) for claim in taken]
                full |= lane.free == 0 or (wanted is not None and len(taken) >= wanted.limit)
            claims = await self._links.add_to(connection, await self._with_siblings(connection, claims))
        self._hungry = full
        self._keeper.written(kept)
        self._progress.announce(moved)
        return claims

    async def _claim_lane(
        self, connection: Connection, wanted: Wanted, now: datetime, fresh: Mapping[UUID, JobRow]
    ) -> list[Claim]:
        found = await steps.due_steps(connection, wanted, now, lock=not self._database.is_sqlite)
        if not found:
            return []
        of_jobs = {step.job_id: fresh[step.job_id] for step in found if step.job_id in fresh}
        if len(of_jobs) < len(found):
            of_jobs |= await jobs.load_jobs(connection, {step.job_id for step in found if step.job_id not in fresh})
        until = now + timedelta(seconds=wanted.lease_seconds)
        ready = [steps.unclaimed(step, of_jobs[step.job_id], until) for step in found]
        if any(claim.job.strategy == "first_success" for claim in ready):
            ready = await self._one_at_a_time(connection, ready)
        taken = await steps.claim(
            connection, ready, self._settings.owner, now,
            can_verify=wanted.can_verify, is_sqlite=self._database.is_sqlite,
        )  # fmt: skip
        if taken:
            await self._book(connection, wanted, now)
        return taken

    async def _book(self, connection: Connection, wanted: Wanted, now: datetime) -> None:
        """Keep other processes from what one may do: the next attempt of a paced lane, the probe of an open one."""
        destination, is_sqlite = self._registry.enabled[wanted.destination], self._database.is_sqlite
        interval = destination.lane.min_interval_seconds
        if interval > 0 and not destination.paces_requests:
            at = now + timedelta(seconds=interval)
            await lanes.book_slot(connection, wanted.destination, at, is_sqlite=is_sqlite)
        if wanted.probe_of is not None:
            at = now + timedelta(seconds=wanted.lease_seconds)
            await lanes.book_probe(connection, wanted.destination, at, is_sqlite=is_sqlite)

    async def _one_at_a_time(self, connection: Connection, ready: list[Claim]) -> list[Claim]:
        siblings = await jobs.load_steps(connection, {claim.job.id for claim in ready})
        view = self._progress.view
        return [
            claim
            for claim in ready
            if may_start(claim.job.strategy, view(claim.step), [view(s) for s in siblings[claim.job.id]])
        ]

    async def _with_siblings(self, connection: Connection, claims: list[Claim]) -> list[Claim]:
        if not claims or len(self.callers) == 1:
            return claims
        of_jobs = await jobs.load_steps(connection, {claim.job.id for claim in claims})
        return [
            replace(
                claim, siblings=tuple(s for s in of_jobs[claim.job.id] if s.destination != claim.step.destination)
            )
            for claim in claims
        ]

    # --- one step ------------------------------------------------------------------------------------------

    async def _run_step(self, claim: Claim) -> None:
        """Run one claimed step, tell its lane what that says of the destination, and hand the ending on."""
        started = time.monotonic()
        ended = await self._ended(claim, started)
        lane = self.lanes[claim.step.destination]
        end = lane.end(claim, ended, time.monotonic() - started, self._database.clock())
        if end is not None:
            self._results.put_nowait(of_link(end) if claim.step.links else end)

    async def _ended(self, claim: Claim, started: float) -> AttemptEnd | None:
        """Look first if the outcome is unknown, else export; None when another process has taken the step over."""
        destination = self._registry.enabled[claim.step.destination]
        try:
            if claim.looks_up:
                end = await self._look_up(claim, destination, started)
            else:
                end = await self._export(claim, destination, started)
        except LeaseLostError:
            _log.warning("lease_lost", session=claim.job.session, destination=claim.step.destination)
            return None
        except LeaseTooShortError:
            _log.warning("lease_too_short", session=claim.job.session, destination=claim.step.destination)
            end = self._endings.not_begun(claim)
        except asyncio.CancelledError:
            end = self._cut(claim, destination, "the service was stopped during the attempt", "interrupted", started)
        except Exception as error:  # noqa: BLE001 - what a plugin gave may break us later; the step must not hang
            _log.exception("attempt_crashed", session=claim.job.session, destination=destination.name)
            end = self._cut(claim, destination, f"{type(error).__name__}: {error}", "internal_error", started)
        return end

    def _cut(self, claim: Claim, destination: Registered, reason: str, code: str, started: float) -> AttemptEnd:
        """End an attempt that did not come to its own end: a request may have left."""
        if claim.looks_up:
            return self._endings.of_look_up(claim, destination, Unsure(reason), started)
        return self._endings.of_attempt(claim, destination, UnknownOutcome(reason, code=code), started)

    async def _export(self, claim: Claim, destination: Registered, started: float) -> AttemptEnd:
        copy = claim.copy
        if copy.unresolved_at is not None and copy.record_id is None and not destination.can_verify:
            return self._endings.unresolved(claim)
        is_there = copy.record_id is not None and copy.sent_sha256 == claim.job.record_sha256
        if claim.step.links and (not is_there or copy.unresolved_at is not None):
            return skipped(claim, "another build is there by now; its own step writes the links")
        if is_there and not claim.step.links and not destination.can_verify:
            # it cannot compare for itself, and a second export could become a second copy
            known = ExportResult(
                success=True, destination_name=destination.name, record_id=copy.record_id,
                record_url=copy.record_url, action="unchanged",
            )  # fmt: skip
            # without its links: they are not written, so they are still lacking
            return self._endings.of_attempt(replace(claim, links={}), destination, known, started)
        context = await self.context_of(claim)
        ending = await self.callers[destination.name].export(context, claim.held_until)
        if isinstance(ending, Declined):
            return skipped(claim, "the destination does not accept this record")
        return self._endings.of_attempt(claim, destination, ending, started)

    async def context_of(self, claim: Claim) -> ExportContext:
        """Build what the destination may know of a claimed record."""
        roots = (self._settings.instrument_root, self._settings.data_root)
        path = self._keeper.spool.path(claim.job.record_sha256 or "", claim.job.record_name or "")
        hashes: frozenset[str] = frozenset()
        if claim.fence > 1:  # somebody was here before: what is found there may be ours with other content
            async with self._database.read() as connection:
                hashes = await jobs.sent_hashes(connection, claim.job.session)
        return build_context(claim, path, self._remember, hashes, roots)

    async def _remember(self, claim: Claim, facts: Mapping[str, Any]) -> None:
        async with self._database.write() as connection:
            if not await steps.remember(connection, claim, facts):
                raise LeaseLostError

    async def _look_up(self, claim: Claim, destination: Registered, started: float) -> AttemptEnd:
        """Ask the destination what became of a request whose outcome is unknown."""
        answer = await self.callers[destination.name].verify(await self.context_of(claim), claim.held_until)
        return self._endings.of_look_up(claim, destination, answer, started)

    # --- T4: results ---------------------------------------------------------------------------------------

    async def _write_results(self) -> None:
        """Write results in groups: what comes while one commit runs is in the next."""
        while True:
            batch = [await self._results.get()]
            while not await self._try_write(batch):  # noqa: ASYNC110 - the database gives no event when it is back
                await asyncio.sleep(IDLE_SECONDS)
            for _ in batch:
                self._results.task_done()

    async def _try_write(self, batch: list[AttemptEnd]) -> bool:
        """Write a batch and what came while it waited for its turn; the batch keeps what is not written."""
        try:
            async with self._database.write() as connection:
                while not self._results.empty():
                    batch.append(self._results.get_nowait())
                now = await self._database.now(connection)
                moved = await self._write_batch(connection, batch, now)
        except DatabaseError as error:
            _log.error("result_not_written", reason=str(error).splitlines()[0], retry_in_seconds=IDLE_SECONDS)
            return False
        self._progress.announce(moved)
        if moved.begun:
            self._signals.steps.set()
        return True

    async def _write_batch(self, connection: Connection, batch: Sequence[AttemptEnd], now: datetime) -> Advanced:
        known = {end.claim.job.id: end.claim.job for end in batch}
        current = await jobs.current_states(connection, known.values(), lock=not self._database.is_sqlite)
        ends = await steps.lock_copies(connection, batch, self._links.involved)
        if len(ends) < len(batch):
            held = set(map(id, ends))
            await self._refuse(connection, [end for end in batch if id(end) not in held])
        written = [of_superseded(end) if current[end.claim.job.id].superseded_by else end for end in ends]
        await steps.write_ends(connection, written, now)
        changes = [end.lane for end in written if end.lane is not None]
        if await lanes.change(connection, changes, now, is_sqlite=self._database.is_sqlite):
            await jobs.decide_waiting_jobs(connection, now)
        linked = await self._links.make_due(connection, written, now)
        moved = await self._progress.advance_loaded(connection, current.values(), now)
        # a retry may be due at once, and a copy that is free again may be what a newer build waits for
        again = any(end.step.next_attempt_at or current[end.claim.job.id].superseded_by for end in written)
        return replace(moved, begun=moved.begun or again or linked)

    async def _refuse(self, connection: Connection, refused: Sequence[AttemptEnd]) -> None:
        """Another process took these steps over: what this one did meanwhile is looked for, and reported."""
        for end in refused:
            step = end.claim.step
            _log.warning("result_refused", session=step.session, destination=step.destination,
                         reason="another process took the step over")  # fmt: skip
        await rechecks.ask_for(connection, refused)
