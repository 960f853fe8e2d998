"""Several consumers on one PostgreSQL: a step is never run by two of them, also when one sleeps and wakes up late."""

import asyncio
import json
import signal
import sys
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.integration.harness import Bus, Service, Site, built, inline, site, small
from tools.servers.ports import free_port
from tools.servers.postgresql import PostgresServer
from tools.servers.process import Child, clean_environment, send, wait_for

TIMEOUT_SECONDS, MARGIN_SECONDS, SETTLE_SECONDS = 1, 2, 1
LEASE_SECONDS = TIMEOUT_SECONDS + MARGIN_SECONDS
SHORT = {
    "NX_LEASE_MARGIN_SECONDS": str(MARGIN_SECONDS),
    "NX_REMOTE_TIMEOUT_SECONDS": str(TIMEOUT_SECONDS),
    "NX_REMOTE_SETTLE_SECONDS": str(SETTLE_SECONDS),
}
RECORDS = 400
#: Of a hundred sessions, so many are built twice.
BUILT_TWICE = 20

#: Each call notes its begin and its end; a third of the sessions meets a fault at its first attempt.
SHARED = """
settle_seconds = 0
limits = Limits(concurrency=8)

async def export(self, context):
    import asyncio
    note("begin", context)
    try:
        first = "begun" not in context.remembered
        fault = int(context.session_identifier) % 6 if first else 0
        await context.remember(begun=True)
        if fault == 1:
            raise Transient("not now")
        if fault == 2:
            raise UnknownOutcome("the connection was reset before the commit")
        await asyncio.sleep(0.005)
        note(context.purpose, context)
        if fault == 3:
            raise UnknownOutcome("the connection was reset after the commit")
        return done(context)
    finally:
        note("end", context)

async def verify(self, context):
    if context.purpose != "recheck":
        note("begin", context)
        note("end", context)
    return Present(context.session_identifier) if noted("create", context) else Absent()
"""

#: Holds copies by key; each POST that arrives whole makes one more. It never closes a connection.
SERVER = """
import json
import sys
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        lines = [json.loads(line) for line in open(sys.argv[2])]
        self.answer(200, [line["id"] for line in lines if line["path"] == self.path])

    def do_POST(self):
        length = int(self.headers["Content-Length"])
        if len(self.rfile.read(length)) < length:
            return
        entry = {"id": uuid.uuid4().hex, "path": self.path}
        with open(sys.argv[2], "ab", buffering=0) as ledger:
            ledger.write(json.dumps(entry).encode() + b"\\n")
        self.answer(201, entry["id"])

    def answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""

#: Stops its whole process, once, on the way to the request that creates.
REMOTE = """
async def export(self, context):
    note("export", context)
    {first}
    try:
        LEDGER.with_suffix(".stop").unlink()
    except FileNotFoundError:
        pass
    else:
        {stop}
    return ExportResult(True, self.name, record_id=await self.send("POST", context.record_key))

def stop(self, context):
    note("stop", context)
    os.kill(os.getpid(), 19)

def stop_when_connected(self, context):
    import asyncio
    loop = asyncio.get_running_loop()
    connect = loop.create_connection

    async def connect_and_stop(*args, **kwargs):
        loop.create_connection = connect
        found = await connect(*args, **kwargs)
        {at_once}
        return found

    loop.create_connection = connect_and_stop

async def verify(self, context):
    note("verify", context)
    ids = await self.send("GET", context.record_key)
    return Present(ids[0], None, tuple(ids[1:])) if ids else Absent()
"""
ASK_FIRST = 'await self.send("GET", context.record_key)'
OURS = """
from consumer.destinations.http import HttpClient, TlsSettings
client = HttpClient("{url}", TlsSettings(), setting="URL")

async def send(self, method, key):
    content = b"<x/>" if method == "POST" else None
    answer = await self.client.request(method, key, creates=method == "POST", content=content)
    return self.client.json_of(answer)
"""
PLAIN = """
import httpx
client = httpx.AsyncClient(base_url="{url}", limits=httpx.Limits(keepalive_expiry=60), trust_env=False)

async def send(self, method, key):
    answer = await self.client.request(method, key, content=b"<x/>" if method == "POST" else None)
    return answer.json()
"""
#: How the process comes to its stop, and what stands in the way of the request then.
STOPS = {
    "kept connection": {"first": ASK_FIRST, "stop": "self.stop(context)"},
    "new connection": {"first": "pass", "stop": "self.stop(context)"},
    "just connected": {"first": "pass", "stop": "self.stop_when_connected(context)"},
    "about to write": {
        "first": "pass", "stop": "self.stop_when_connected(context)", "at_once": "loop.call_soon(self.stop, context)",
    },
}  # fmt: skip
CLIENTS = {
    f"{name}, {stop}": client + REMOTE.format(**{"at_once": "self.stop(context)", **parts})
    for name, client in (("ours", OURS), ("plain httpx", PLAIN))
    for stop, parts in STOPS.items()
    if name == "ours" or stop in {"kept connection", "about to write"}
}


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[str]:
    """Give an empty PostgreSQL database."""
    postgres.start()
    name = f"leases_{uuid.uuid4().hex[:12]}"
    yield postgres.create_database(name)
    postgres.drop_database(name)


class Remote(Child):
    """The server that holds copies, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.ledger = folder / "copies.jsonl"
        self.ledger.touch()
        command = [sys.executable, "-c", SERVER, str(self.port), str(self.ledger)]
        super().__init__(command, env=clean_environment(), log=folder / "remote.log", cwd=folder)

    @property
    def url(self) -> str:
        """Return its address."""
        return f"http://127.0.0.1:{self.port}/"

    def copies(self) -> list[dict[str, Any]]:
        """Return all it holds."""
        return [json.loads(line) for line in self.ledger.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    """Give a server that holds copies."""
    server = Remote(tmp_path)
    try:
        yield server
    finally:
        server.kill()


def is_stopped(pid: int) -> bool:
    """Tell whether a process is stopped by a signal."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "T"


# --- many records ----------------------------------------------------------------------------------------------


def test_two_consumers_never_run_the_same_step_at_once(tmp_path: Path, amqp_url: str, database: str) -> None:
    with site(tmp_path, amqp_url, database, plugins={"shared": SHARED}, NX_LOCAL_ARCHIVE_PATH="") as (here, bus):
        services = [here.start(), here.start()]
        sessions = [str(number) for number in range(RECORDS)]
        ids = [*sessions, *(f"{name} again" for name in sessions if int(name) % 100 < BUILT_TWICE)]
        for event_id in ids:
            name = event_id.split()[0]
            bus.publish(built(name, inline(f"{name}.xml", small(int(name)).content), event_id=event_id))
        for event_id in ids:
            assert bus.outcome(event_id, seconds=60, log=services[0].log).data["status"] == "COMPLETED", event_id
        for service in services:
            service.shut_down()

        calls: dict[str, list[tuple[str, int]]] = defaultdict(list)
        created: Counter[str] = Counter()
        pids = set()
        for entry in here.ledger("shared", None):
            pids.add(entry["pid"])
            if entry["what"] in {"begin", "end"}:
                calls[entry["session"]].append((entry["what"], entry["pid"]))
            elif entry["what"] == "create":
                created[entry["session"]] += 1
        assert pids == {service.pid for service in services}  # else nothing was shared
        assert created == dict.fromkeys(sessions, 1)
        for session, found in calls.items():
            pairs = list(zip(found[::2], found[1::2], strict=True))
            assert all((begin, end) == (("begin", begin[1]), ("end", begin[1])) for begin, end in pairs), session
        moved = [name for name, found in calls.items() if len({pid for _, pid in found}) > 1]
        assert moved  # some sessions were handled by one process after the other


# --- one that sleeps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", CLIENTS)
def test_a_process_stopped_before_its_request_makes_no_second_copy(
    tmp_path: Path, amqp_url: str, database: str, remote: Remote, client: str
) -> None:
    plugins = {"remote": CLIENTS[client].replace("{url}", remote.url)}
    with site(tmp_path, amqp_url, database, plugins=plugins, NX_LOCAL_ARCHIVE_PATH="", **SHORT) as (here, bus):
        services = {service.pid: service for service in (here.start(), here.start())}
        (here.plugins / "remote.stop").touch()
        bus.publish(built("held", inline("a.xml", small(1).content), event_id="held"))
        wait_for(lambda: here.ledger("remote", "stop"), 15, "an attempt about to send")
        (stop,) = here.ledger("remote", "stop")
        sleeper = services.pop(stop["pid"])
        (other,) = services.values()
        try:
            wait_for(lambda: is_stopped(sleeper.pid), 5, "the stopped process")
            outcome = bus.outcome("held", seconds=30, log=other.log)
            assert outcome.data["status"] == "COMPLETED"
            wait_for(lambda: time.time() > stop["at"] + 3 * LEASE_SECONDS, 30, "three leases")
            assert len(remote.copies()) == 1
        finally:
            send(sleeper.pid, signal.SIGCONT)
        check_one_copy(here, bus, remote, sleeper, other)
        first, second = here.ledger("remote", "export")
        assert (first["pid"], second["pid"]) == (sleeper.pid, other.pid)
        # nobody may create before the last request of the other one is surely over
        assert second["at"] - stop["at"] > LEASE_SECONDS + SETTLE_SECONDS - 0.5
        before = [entry["pid"] for entry in here.ledger("remote", "verify") if entry["at"] < second["at"]]
        assert set(before) == {other.pid}


#: Runs in a thread, with a client of its own: nothing can keep it from sending when its process goes on.
IN_A_THREAD = """
def export(self, context):
    note("export", context)
    try:
        LEDGER.with_suffix(".stop").unlink()
    except FileNotFoundError:
        pass
    else:
        note("stop", context)
        os.kill(os.getpid(), 19)
        last = now = time.monotonic()
        while now - last < 1:  # the signal stops this thread when it likes; a jump shows that it did
            last, now = now, time.monotonic()
    return ExportResult(True, self.name, record_id=self.send(context.record_key, b"<x/>"))

def send(self, key, content=None):
    import urllib.request
    with urllib.request.urlopen("{url}" + key, content) as answer:
        return json.loads(answer.read())

def verify(self, context):
    ids = self.send(context.record_key)
    return Present(ids[0], None, tuple(ids[1:])) if ids else Absent()
"""


def test_a_second_copy_that_nothing_could_prevent_is_reported(
    tmp_path: Path, amqp_url: str, database: str, remote: Remote
) -> None:
    plugins = {"remote": IN_A_THREAD.replace("{url}", remote.url)}
    with site(tmp_path, amqp_url, database, plugins=plugins, NX_LOCAL_ARCHIVE_PATH="", **SHORT) as (here, bus):
        services = {service.pid: service for service in (here.start(), here.start())}
        (here.plugins / "remote.stop").touch()
        bus.publish(built("held", inline("a.xml", small(1).content), event_id="held"))
        wait_for(lambda: here.ledger("remote", "stop"), 15, "an attempt about to send")
        sleeper = services.pop(here.ledger("remote", "stop")[0]["pid"])
        (other,) = services.values()
        try:
            bus.outcome("held", seconds=30, log=other.log)
        finally:
            send(sleeper.pid, signal.SIGCONT)
        first, second = wait_for_two(remote, sleeper)
        other.wait_for(lambda: here.log_rows("held")[-1]["error_code"] == "surplus_copy", "the report", 30)
        assert here.log_rows("held")[-1]["record_id"] == first["id"]
        assert second["id"] in here.log_rows("held")[-1]["error_message"]
        assert len(bus.outcomes("held")) == 1


def wait_for_two(remote: Remote, service: Service) -> list[dict[str, str]]:
    """Wait for the second copy."""
    service.wait_for(lambda: len(remote.copies()) == 2, "the second copy")
    return remote.copies()


def check_one_copy(here: Site, bus: Bus, remote: Remote, sleeper: Service, other: Service) -> None:
    """Wait until both processes have done all they will, and look at what there is."""
    sleeper.wait_for(
        lambda: any(word in sleeper.logged() for word in ("result_refused", "lease_lost")), "the refusal"
    )
    looked = "SELECT 1 FROM copies WHERE recheck_at IS NOT NULL"
    other.wait_for(lambda: not here.sql(looked), "the last look-up")
    for service in (sleeper, other):
        service.shut_down()
    (copy,) = remote.copies()
    (outcome,) = bus.outcomes("held")
    assert outcome.result("remote")["record_id"] == copy["id"]
    codes = [(row["error_code"], bool(row["success"])) for row in here.log_rows("held")]
    assert codes == [("interrupted", False), (None, True)]


#: Makes the commit of a claim slow, so that its process can be stopped in the middle of it.
SLOW_CLAIMS = """
CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(0.5); RETURN NULL; END $$;
CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON steps DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW WHEN (NEW.state = 'running') EXECUTE FUNCTION slow()
"""
SLEEPING = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"


async def execute(url: str, statements: str) -> None:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        await connection.execute(statements)
    finally:
        await connection.close()


def test_a_process_stopped_between_its_claim_and_the_attempt_does_not_begin_it(
    tmp_path: Path, amqp_url: str, database: str, remote: Remote
) -> None:
    plugins = {"remote": CLIENTS["ours, new connection"].replace("{url}", remote.url)}
    with site(tmp_path, amqp_url, database, plugins=plugins, NX_LOCAL_ARCHIVE_PATH="", **SHORT) as (here, bus):
        sleeper = here.start()
        asyncio.run(execute(database, SLOW_CLAIMS))
        bus.publish(built("held", inline("a.xml", small(1).content), event_id="held"))
        sleeper.wait_for(lambda: here.sql(SLEEPING), "the commit of a claim")
        send(sleeper.pid, signal.SIGSTOP)
        try:
            wait_for(lambda: is_stopped(sleeper.pid), 5, "the stopped process")
            stopped_at = time.monotonic()
            asyncio.run(execute(database, "DROP FUNCTION slow CASCADE"))
            (step,) = here.sql("SELECT state FROM steps")
            assert step["state"] == "running"
            assert here.ledger("remote", None) == []
            other = here.start()
            assert bus.outcome("held", seconds=30, log=other.log).data["status"] == "COMPLETED"
            wait_for(lambda: time.monotonic() > stopped_at + 3 * LEASE_SECONDS, 30, "three leases")
        finally:
            send(sleeper.pid, signal.SIGCONT)
        check_one_copy(here, bus, remote, sleeper, other)
        assert [entry["pid"] for entry in here.ledger("remote", "export")] == [other.pid]
