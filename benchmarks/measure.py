"""One measurement: fill the queue, start a consumer, time its outcomes, check that none is missing."""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aio_pika
import psutil
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage

from benchmarks import messages
from benchmarks.candidates import Candidate

_CONFIRM_WINDOW = 200
_WARM_UP_SHARE = 0.1
_STALL_SECONDS = 60.0
_SURPLUS_SECONDS = 0.5  # how long outcomes that should not exist may take to show up
_TERM_SECONDS = 10.0


class InvalidRunError(Exception):
    """A consumer that did not do the whole work exactly once; its speed means nothing."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run of one program cost."""

    rate: float  # records a second, from queue to confirmed outcome, after the warm-up
    whole_rate: float  # the same from the first outcome on
    cpu_ms: float  # of the consumer process, for one record
    peak_mib: float  # resident memory of the consumer process


@dataclass(frozen=True, slots=True)
class _Instant:
    clock: float
    cpu: float


@dataclass(slots=True)
class _Meter:
    """Takes outcomes and notes the instants between which the rates are measured.

    The rate after the warm-up has no start-up in it. A program that reads far ahead of its outcomes does
    work in the warm-up that this rate does not see; the rate from the first outcome shows if one does.
    """

    expected: int
    process: psutil.Process | None = None
    bodies: list[bytes] = field(default_factory=list)
    first: float = 0.0
    begin: _Instant | None = None
    end: _Instant | None = None

    @property
    def warm_up(self) -> int:
        return max(2, int(self.expected * _WARM_UP_SHARE))

    async def take(self, message: AbstractIncomingMessage) -> None:
        # parsing waits until the clock has stopped: this process must cost little, and the same for everyone
        self.bodies.append(message.body)
        if len(self.bodies) == 1:
            self.first = time.perf_counter()
        elif len(self.bodies) == self.warm_up:
            self.begin = self._now()
        elif len(self.bodies) == self.expected:
            self.end = self._now()

    def result(self, peak_mib: float) -> Measured:
        if self.begin is None or self.end is None:
            raise InvalidRunError("the clock never started or never stopped")
        counted = self.expected - self.warm_up
        return Measured(
            rate=counted / (self.end.clock - self.begin.clock),
            whole_rate=(self.expected - 1) / (self.end.clock - self.first),
            cpu_ms=1000 * (self.end.cpu - self.begin.cpu) / counted,
            peak_mib=peak_mib,
        )

    def _now(self) -> _Instant:
        cpu = self.process.cpu_times() if self.process else None
        return _Instant(time.perf_counter(), cpu.user + cpu.system if cpu else 0.0)


async def measure(url: str, candidate: Candidate, events: Sequence[messages.Built]) -> Measured:
    """Measure one program on an empty topology; ``InvalidRunError`` if it lost or repeated anything."""
    # not a robust connection: its channels answer a queue's length from memory
    connection = await aio_pika.connect(url)
    async with connection:
        channel = await connection.channel(on_return_raises=True)
        await _declare(channel)
        await _publish(channel, events)
        meter = _Meter(expected=len(events))
        outcomes = await channel.get_queue(messages.OUTCOME_QUEUE)
        await outcomes.consume(meter.take, no_ack=True)
        peak_mib = await _run(candidate, meter)
        _check_outcomes(meter.bodies, events)
        await _check_empty(channel)
        return meter.result(peak_mib)


async def _declare(channel: AbstractChannel) -> None:
    """Make the queues of the design anew, so that nothing of the run before is left."""
    for name in (messages.WORK_QUEUE, messages.DEAD_QUEUE, messages.OUTCOME_QUEUE):
        await channel.queue_delete(name)
    exchange = await channel.declare_exchange(messages.EXCHANGE, aio_pika.ExchangeType.TOPIC, durable=True)
    work = await channel.declare_queue(
        messages.WORK_QUEUE,
        durable=True,
        arguments={
            "x-queue-type": "quorum",
            "x-delivery-limit": 1000,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": messages.DEAD_QUEUE,
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    )
    await work.bind(exchange, messages.BUILT)
    await channel.declare_queue(
        messages.DEAD_QUEUE,
        durable=True,
        arguments={"x-queue-type": "quorum", "x-delivery-limit": 1_000_000},
    )
    outcomes = await channel.declare_queue(messages.OUTCOME_QUEUE, durable=True, arguments={"x-queue-type": "quorum"})
    for kind in (messages.EXPORTED, messages.EXPORT_FAILED):
        await outcomes.bind(exchange, kind)


async def _publish(channel: AbstractChannel, events: Sequence[messages.Built]) -> None:
    exchange = await channel.get_exchange(messages.EXCHANGE)
    window = asyncio.Semaphore(_CONFIRM_WINDOW)

    async def publish(event: messages.Built) -> None:
        async with window:
            message = aio_pika.Message(
                event.body,
                message_id=event.id,
                content_type=messages.CONTENT_TYPE,
                delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            )
            await exchange.publish(message, messages.BUILT, mandatory=True)

    async with asyncio.TaskGroup() as group:
        for event in events:
            group.create_task(publish(event))


async def _run(candidate: Candidate, meter: _Meter) -> float:
    """Run the program until all its outcomes are here; return its peak memory in MiB."""
    log = candidate.folder / "output.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *candidate.command,
            cwd=candidate.folder,
            env=candidate.environment,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
        )
    meter.process = psutil.Process(process.pid)
    try:
        await _wait(process, meter)
        await asyncio.sleep(_SURPLUS_SECONDS)
        return _peak_mib(process.pid)
    except InvalidRunError as error:
        raise InvalidRunError(f"{error}; its output ends with:\n{_tail(log)}") from None
    finally:
        await _end(process)


async def _wait(process: asyncio.subprocess.Process, meter: _Meter) -> None:
    seen, since = -1, time.monotonic()
    while meter.end is None:
        if process.returncode is not None:
            raise InvalidRunError(
                f"ended with {process.returncode} after {len(meter.bodies)} of {meter.expected} outcomes"
            )
        if len(meter.bodies) != seen:
            seen, since = len(meter.bodies), time.monotonic()
        elif time.monotonic() - since > _STALL_SECONDS:
            raise InvalidRunError(f"stands still at {seen} of {meter.expected} outcomes")
        await asyncio.sleep(0.1)


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _TERM_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()


def _check_outcomes(bodies: Sequence[bytes], events: Sequence[messages.Built]) -> None:
    """Refuse missing, repeated and failed outcomes: each event has exactly one, and it is a success."""
    outcomes = [json.loads(body) for body in bodies]
    failed = [outcome for outcome in outcomes if outcome["type"] != messages.EXPORTED]
    if failed:
        raise InvalidRunError(f"{len(failed)} failed outcomes, the first: {failed[0]}")
    ids = {outcome["id"] for outcome in outcomes}
    causes = {outcome["data"]["cause"]["id"] for outcome in outcomes}
    if not len(ids) == len(outcomes) == len(events) or causes != {event.id for event in events}:
        raise InvalidRunError(
            f"{len(outcomes)} outcomes with {len(ids)} ids for {len(causes)} of {len(events)} events"
        )


async def _check_empty(channel: AbstractChannel) -> None:
    """Look after the consumer is gone: what it had taken and not acked is back in the queue then."""
    await asyncio.sleep(_SURPLUS_SECONDS)
    for name in (messages.WORK_QUEUE, messages.DEAD_QUEUE):
        queue = await channel.declare_queue(name, passive=True)
        left = queue.declaration_result.message_count
        if left:
            raise InvalidRunError(f"{left} messages are left in {name}")


def _peak_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2_000:]
