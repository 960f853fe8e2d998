"""What must be true when a run is over, whatever was killed in it: plain SQL, the server's ledger, what was heard."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.crash.world import Expected, Remote, World
from tests.integration.harness import Heard, job_of, outcome_id, sha256
from tools.records import Record


@dataclass(frozen=True)
class Problem:
    """One thing that is not as promised."""

    kind: Literal["lost", "duplicated", "wrong"]
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


Problems = Iterator[Problem]


def problems_of(world: World) -> list[Problem]:
    """Check a run that is over; the service has been stopped."""
    world.bus.fetch_letters()
    found: list[Problem] = []
    for item in world.expected:
        found += _event(world, item)
    for session, builds in world.contents.items():
        found += _copies(world, session, builds)
        found += _archive(world, builds)
        if world.linked:
            found += _links(world, world.linked, session, builds)
    found += _messages(world)
    found += _tables(world)
    return found


def _event(world: World, item: Expected) -> Problems:
    job = world.site.job(item.event_id)
    if job is None:
        yield Problem("lost", f"{item.event_id} has no job")
        return
    if job["state"] not in item.states or job["revision"] != item.revision:
        yield Problem("wrong", f"{item.event_id} is {job['state']} at revision {job['revision']}")
    outcomes = [heard for heard in world.bus.outcomes(item.event_id) if heard.data["revision"] == item.revision]
    if not outcomes:
        yield Problem("lost", f"{item.event_id} has no outcome of revision {item.revision}")
    for heard in outcomes:
        if heard.data["status"] != item.status:
            yield Problem("wrong", f"the outcome of {item.event_id} says {heard.data['status']}")
    for heard in outcomes[:1]:
        yield from _claims(world, heard)
    rows = world.site.sql("SELECT message_id FROM outbox WHERE job_id = ? AND kind = 'outcome'", job["id"])
    wanted = sorted(outcome_id(item.event_id, number) for number in range(1, item.revision + 1))
    if sorted(row["message_id"] for row in rows) != wanted:
        yield Problem("duplicated", f"the outbox holds {len(rows)} outcomes of {item.event_id}")


def _claims(world: World, heard: Heard) -> Problems:
    """Compare the copies that an outcome names with what is there."""
    session = heard.data["session_identifier"]
    parts = {"doors": world.remote, "linker": world.linked}
    there = {name: {record["id"] for record in part.records(session)} for name, part in parts.items() if part}
    for result in heard.data["results"]:
        if not result["success"]:
            continue
        name, key = result["destination"], result["record_id"]
        exists = (world.site.archive / str(key)).is_file() if name == "local_archive" else key in there[name]
        if not exists:
            yield Problem("lost", f"the outcome of {heard.cause} names {key} at {name}, which is not there")


def _copies(world: World, session: str, builds: list[Record]) -> Problems:
    records = world.remote.records(session)
    wanted = 0 if session in world.refused else 1
    if len(records) > wanted:
        yield Problem("duplicated", f"{len(records)} records of {session} at the server")
    elif len(records) < wanted:
        yield Problem("lost", f"no record of {session} at the server")
    elif records and records[0]["sha256"] != sha256(builds[0].content):
        yield Problem("wrong", f"the record of {session} at the server is not the newest build")
    for row in world.site.sql("SELECT * FROM copies WHERE session = ?", session):
        if row["holder"] is not None or row["lease_until"] is not None:
            yield Problem("wrong", f"the copy of {session} at {row['destination']} is still held")
        if row["destination"] == "doors" and records and row["record_id"] != records[0]["id"]:
            yield Problem("wrong", f"we remember {row['record_id']} for {session}, there is {records[0]['id']}")


def _links(world: World, linked: Remote, session: str, builds: list[Record]) -> Problems:
    there = linked.records(session)
    if len(there) != 1:
        yield Problem("duplicated" if there else "lost", f"{len(there)} linking records of {session}")
        return
    if there[0]["sha256"] != sha256(builds[0].content):
        yield Problem("wrong", f"the linking record of {session} is not the newest build")
    wanted = [f"{world.remote.url}/records/{record['id']}" for record in world.remote.records(session)]
    if [there[0]["link"]] != wanted:
        yield Problem("lost", f"the record of {session} links to {there[0]['link']} instead of {wanted}")


def _archive(world: World, builds: list[Record]) -> Problems:
    path = world.site.archived(builds[0])
    if not path.is_file():
        yield Problem("lost", f"{path.name} is not in the archive")
        return
    if path.read_bytes() != builds[0].content:
        yield Problem("wrong", f"{path.name} in the archive is not the newest build")
    manifest = json.loads(path.with_suffix(".json").read_bytes())
    if manifest["sha256"] != sha256(builds[0].content):
        yield Problem("wrong", f"the manifest of {path.name} is of other bytes")
    kept = [version["file"] for version in manifest["versions"]]
    files = sorted(other.name for other in path.parent.glob("*.xml"))
    if files != sorted([path.name, *kept]):
        yield Problem("duplicated", f"the archive holds {files}, its manifest names {kept}")
    yield from _versions(path, kept, builds[1:])


def _versions(path: Path, kept: list[str], earlier: list[Record]) -> Problems:
    """Compare earlier versions; a build that was superseded before its turn need not be among them."""
    known = {record.content for record in earlier}
    contents = [(path.parent / name).read_bytes() for name in kept]
    if any(content not in known for content in contents) or len(set(contents)) != len(contents):
        yield Problem("wrong", f"the earlier versions of {path.name} are not the earlier builds")


def _messages(world: World) -> Problems:
    """Compare what listeners got: repeats have the same id and the same bytes."""
    bodies: defaultdict[str, set[bytes]] = defaultdict(set)
    ids: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
    for heard in world.bus.heard:
        bodies[heard.event["id"]].add(heard.body)
        ids[heard.cause, heard.data["revision"]].add(heard.event["id"])
    for name, versions in bodies.items():
        if len(versions) > 1:
            yield Problem("duplicated", f"outcome {name} came with {len(versions)} contents")
    for (event_id, revision), names in ids.items():
        if len(names) > 1:
            yield Problem("duplicated", f"{len(names)} outcomes of {event_id}, revision {revision}")
    letters = {letter.message_id for letter in world.bus.letters}
    if len(letters) != world.letters:
        kind: Any = "lost" if len(letters) < world.letters else "duplicated"
        yield Problem(kind, f"{len(letters)} dead letters instead of {world.letters}")


def _tables(world: World) -> Problems:
    site = world.site
    if site.sql("SELECT seq FROM outbox WHERE sent_at IS NULL"):
        yield Problem("lost", "the outbox holds messages that were not sent")
    open_states = "('blocked', 'due', 'running', 'unsettled', 'uncertain')"
    for step in site.sql(f"SELECT * FROM steps WHERE state IN {open_states}"):  # noqa: S608 - no value from outside
        yield Problem("wrong", f"a step at {step['destination']} is {step['state']}")
    if depth := world.bus.depth():
        yield Problem("wrong", f"{depth} messages are left in the work queue")
    unknown = {str(row["id"]) for row in site.sql("SELECT id FROM jobs")}
    if unknown != {str(job_of(item.event_id)) for item in world.expected}:
        yield Problem("wrong", f"{len(unknown)} jobs, {len(world.expected)} events")
    done = site.sql(
        "SELECT jobs.event_id, steps.destination FROM steps JOIN jobs ON jobs.id = steps.job_id"
        " WHERE steps.state = 'done'"
    )
    log = Counter(
        (row["event_id"], row["destination_name"])
        for row in site.sql("SELECT * FROM upload_log")
        if row["success"] and row["purpose"] != "link"
    )
    if log != Counter((row["event_id"], row["destination"]) for row in done):
        yield Problem("wrong", f"upload_log counts {dict(log)} successes, {len(done)} steps are done")
