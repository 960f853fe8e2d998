"""`make conformance`: every built-in destination in the conformance kit, against a real CDCS and the test servers.

Each destination meets forty wire faults at every request that they can strike (`consumer/testing/faults.py`), the
archive twelve disk faults (`consumer/testing/disk_faults.py`). How many copies there are is read from the servers'
own books. The last line is the result.
"""

import argparse
import asyncio
import json
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

from consumer.commands import conformance as command
from consumer.config import Environment, Value
from consumer.destinations.cdcs import Cdcs
from consumer.destinations.elabftw import Elabftw
from consumer.destinations.elabftw_entry import RECORD_KEY
from consumer.destinations.labarchives import LabArchives
from consumer.destinations.labarchives_rules import DELETED_FOLDER
from consumer.destinations.local_archive import LocalArchive
from consumer.testing.conformance import Report, prove
from consumer.testing.conformance_disk import prove_on_disk
from consumer.testing.conformance_subject import Count, Options, Probe, Subject
from consumer.testing.elabftw_accounts import SERVICE_KEY
from consumer.testing.labarchives_api import KEY_ID, PASSWORD
from consumer.testing.labarchives_server import NOTEBOOK, UID
from tools.servers.cdcs import CdcsServer
from tools.servers.ports import free_port
from tools.servers.process import Child, ServerError, clean_environment

PROJECT = Path(__file__).resolve().parents[1]
START_SECONDS = 30
#: Length of the key in the name of a LabArchives page.
PAGE_KEY = 12


def environment(**values: str) -> Environment:
    """Return settings as if they had been given."""
    return Environment({name: Value(text, "tools/conformance.py") for name, text in values.items()})


def fetch(url: str, headers: Mapping[str, str] | None = None) -> Any:
    """Return the JSON of an address on this machine."""
    request = urllib.request.Request(url, headers=dict(headers or {}))  # noqa: S310 - an address of ours
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return json.load(answer)


def counting(copies: Callable[[Probe], int]) -> Count:
    """Let a blocking function count."""

    async def count(probe: Probe) -> int:
        return await asyncio.to_thread(copies, probe)

    return count


def start(stack: ExitStack, folder: Path, module: str, *more: str) -> str:
    """Start a test server of `consumer.testing`; returns its address."""
    port = free_port()
    arguments = [sys.executable, "-m", f"consumer.testing.{module}", "--port", str(port), *more]
    environ = clean_environment(PYTHONPATH=str(PROJECT))
    child = Child(arguments, env=environ, log=folder / f"{module}.log", cwd=folder)
    stack.callback(child.kill)
    child.wait_until(lambda: _serves(port), START_SECONDS, f"{module} on port {port}")
    return f"http://127.0.0.1:{port}/"


def _serves(port: int) -> bool:
    """Tell whether there is a server, whatever it thinks of the question."""
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5).close()
    except HTTPError as answer:
        answer.close()
    except OSError:
        return False
    return True


# --- the destinations, their servers, and who counts -------------------------------------------------------------


def cdcs(stack: ExitStack, folder: Path, faults: tuple[str, ...]) -> Subject:
    """Start a real CDCS; records in the public workspace are counted by title, as an administrator sees them."""
    server = CdcsServer(folder / "cdcs")
    stack.callback(server.kill)
    server.start()
    token = {"Authorization": f"Token {server.admin_token}"}

    def copies(probe: Probe) -> int:
        found = fetch(f"{server.url}rest/admin/data/?title={quote(probe.title)}", token)
        return sum(record["workspace"] is not None for record in found)

    settings = environment(NX_CDCS_URL=server.url, NX_CDCS_TOKEN=server.admin_token)
    options = Options(limit_seconds=6, settle_seconds=2, parallel=12, only=faults)
    return Subject(Cdcs, settings, options, count=counting(copies))


def elabftw(stack: ExitStack, folder: Path, faults: tuple[str, ...]) -> Subject:
    """Start the eLabFTW test server; live experiments are counted by key, or the record's attachments if more."""
    url = start(stack, folder, "elabftw_server")

    def copies(probe: Probe) -> int:
        state = fetch(f"{url}_control/state")
        key = probe.key.replace("-", "")
        ours = [entry["id"] for entry in state["experiments"] if entry["state"] == 1 and _key_of(entry) == key]
        files = [file for file in state["uploads"] if file["item_id"] in ours and file["state"] == 1]
        records = [file for file in files if file["hash"] == probe.sha256]
        names = [(file["item_id"], file["real_name"]) for file in files]
        if len(ours) == 1 and not records:
            return 0  # an experiment without its record is no copy
        return max(len(ours), len(records), len(names) - len(set(names)) + 1)

    settings = environment(NX_ELABFTW_URL=url, NX_ELABFTW_API_KEY=SERVICE_KEY)
    return Subject(Elabftw, settings, Options(only=faults, parallel=24), count=counting(copies))


def _key_of(entry: Mapping[str, Any]) -> str:
    metadata = entry["metadata"]
    fields = (json.loads(metadata) if isinstance(metadata, str) else metadata or {}).get("extra_fields", {})
    return str(fields.get(RECORD_KEY, {}).get("value", ""))


def labarchives(stack: ExitStack, folder: Path, faults: tuple[str, ...]) -> Subject:
    """Start the LabArchives test server; pages outside of the deleted ones are counted by the key in their name."""
    url = start(stack, folder, "labarchives_server", "--interval", "0")

    def copies(probe: Probe) -> int:
        state = fetch(f"{url}control/state")
        key = probe.key.replace("-", "")[:PAGE_KEY]
        deleted = {node["id"] for node in state["nodes"] if node["name"] == DELETED_FOLDER}
        pages = [n["id"] for n in state["nodes"] if f"[k:{key}]" in n["name"] and n["parent"] not in deleted]
        entries = [entry for entry in state["entries"] if entry["page"] in pages]
        records = [entry for entry in entries if f"sha256:{probe.sha256}" in entry["caption"]]
        texts = [entry for entry in entries if entry["content"] is None]
        files = [(entry["page"], entry["caption"]) for entry in entries if entry["content"] is not None]
        if len(pages) == 1 and not (records and texts):
            return 0  # a page without its record is no copy
        twice = len(files) - len(set(files)) + len(texts) - len({text["data"] for text in texts})
        return max(len(pages), len(records), twice + 1)

    settings = environment(
        NX_LABARCHIVES_URL=f"{url}api", NX_LABARCHIVES_ACCESS_KEY_ID=KEY_ID, NX_LABARCHIVES_ACCESS_PASSWORD=PASSWORD,
        NX_LABARCHIVES_USER_ID=UID, NX_LABARCHIVES_NOTEBOOK_ID=NOTEBOOK, NX_LABARCHIVES_MIN_INTERVAL_SECONDS="0",
    )  # fmt: skip
    creates = (r"^\w+ .*/(insert_node|add_\w+|update_\w+)$",)
    return Subject(LabArchives, settings, Options(only=faults, parallel=24, creates=creates), count=counting(copies))


def local_archive(_stack: ExitStack, folder: Path, faults: tuple[str, ...]) -> Subject:
    """Take a folder."""
    settings = environment(NX_LOCAL_ARCHIVE_PATH=str(folder / "archive"))
    return Subject(LocalArchive, settings, Options(only=faults), url_setting="NX_LOCAL_ARCHIVE_PATH")


SUBJECTS = {maker.__name__: maker for maker in (cdcs, elabftw, labarchives, local_archive)}


async def prove_one(name: str, folder: Path, faults: tuple[str, ...]) -> Report:
    """Start what a destination needs and prove it."""
    with ExitStack() as stack:
        subject = await asyncio.to_thread(SUBJECTS[name], stack, folder, faults)
        if name == local_archive.__name__:
            return await prove_on_disk(subject)
        return await prove(subject, tell=lambda line: print(line, flush=True))


def last_line(reports: list[Report]) -> str:
    """Return the result of all."""
    scores = ", ".join(f"{report.destination} {report.score}" for report in reports)
    duplicates = sum(report.count("duplicate") for report in reports)
    losses = sum(report.count("loss") for report in reports)
    return f"conformance: {scores}, {duplicates} duplicates, {losses} losses"


def main(arguments: list[str] | None = None) -> int:
    """Prove the built-in destinations; exit code 1 when anything is off."""
    parser = argparse.ArgumentParser(prog="python -m tools.conformance", description=main.__doc__)
    parser.add_argument("--only", action="append", choices=tuple(SUBJECTS), help="a destination; may be repeated")
    parser.add_argument("--fault", action="append", help="a fault; may be repeated")
    parser.add_argument("--details", action="store_true", help="a line for each fault, not only for what is wrong")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = Path(tempfile.mkdtemp(prefix="nexus-conformance-"))
    began, reports = time.monotonic(), []
    try:
        for name in given.only or SUBJECTS:
            report = asyncio.run(prove_one(name, folder, tuple(given.fault or ())))
            reports.append(report)
            command.show(report, as_json=False, details=given.details)
    except ServerError as error:
        print(f"conformance failed: {error}; everything is kept in {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; everything is kept in {folder}", file=sys.stderr)
        return 130
    shutil.rmtree(folder)
    print(f"{time.monotonic() - began:.0f} s, {sum(len(report.cases) for report in reports)} cases")
    command.grade_table(reports)
    print(last_line(reports))
    return 0 if all(report.good for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
