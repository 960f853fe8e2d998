"""The kit's end of the fault proxy: starts its process, and one wire for each case."""

import asyncio
import json
import sys
from dataclasses import dataclass
from typing import Any, Self

_STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Strike:
    """Which request a fault strikes: the ``number``-th of its kind, the ``position``-th of all."""

    fault: str
    variant: str
    kind: str
    number: int
    position: int


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as the proxy saw it; ``status`` is the server's answer, None without one."""

    method: str
    path: str
    kind: str
    struck: str
    status: int | None
    failed: str


class Proxy:
    """The fault proxy's process."""

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._lock = asyncio.Lock()

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "consumer.testing.fault_proxy",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output = self._process.stdout
        port = int(await output.readline()) if output is not None else 0
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._process is None:
            return
        if self._process.stdin is not None:
            self._process.stdin.close()  # it ends with its input
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    async def ask(self, **wish: Any) -> dict[str, Any]:
        """Send one wish and return its answer."""
        if self._reader is None or self._writer is None:
            raise RuntimeError("the proxy is not running")
        async with self._lock:
            self._writer.write(json.dumps(wish).encode() + b"\n")
            answer = json.loads(await self._reader.readline())
        if "error" in answer:
            raise RuntimeError(f"the fault proxy refused {wish}: {answer['error']}")
        return dict(answer)

    async def open(
        self, server: tuple[str, int, bool], patterns: dict[str, list[str]], limit_seconds: float, late_seconds: float
    ) -> "Wire":
        """Open a wire to a server."""
        host, port, tls = server
        bounds = {"limit": limit_seconds, "late": late_seconds}
        answer = await self.ask(do="open", host=host, port=port, tls=tls, **patterns, **bounds)
        return Wire(self, answer["id"], answer["port"])


@dataclass(frozen=True, slots=True)
class Wire:
    """One way to the server, whole until a fault is armed."""

    proxy: Proxy
    id: int
    port: int

    async def arm(self, strike: Strike) -> None:
        """Let a fault wait for its request."""
        await self.proxy.ask(
            do="arm", id=self.id, fault=strike.fault, variant=strike.variant, kind=strike.kind,
            number=strike.number, position=strike.position,
        )  # fmt: skip

    async def mend(self) -> None:
        """Make the wire whole, and begin a new ledger."""
        await self.proxy.ask(do="mend", id=self.id)

    async def ledger(self) -> tuple[list[Seen], list[str]]:
        """Return the requests since then, and what reached another host."""
        answer = await self.proxy.ask(do="ledger", id=self.id)
        return [Seen(**entry) for entry in answer["entries"]], list(answer["trapped"])

    async def close(self) -> None:
        """Close it; a late commit under way goes on."""
        await self.proxy.ask(do="close", id=self.id)
