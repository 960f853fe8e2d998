"""What operators type, against a real broker: answers, and exit codes that scripts can trust."""

import json
import os
import pty
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import Bus, Site, job_of, site, small
from tools.servers.ports import free_port
from tools.servers.process import wait_for
from tools.servers.rabbitmq import RabbitServer

SECRET = "s3cret-and-never-shown"
COMMANDS = ["run", "publish", "export", "status", "destinations", "doctor", "init", "schema", "config", "db"]

World = tuple[Site, Bus]


@pytest.fixture(scope="module")
def world(rabbitmq: RabbitServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Give an installation with a running service."""
    rabbitmq.start()
    url = rabbitmq.create_vhost("commands")
    with site(tmp_path_factory.mktemp("commands"), url) as (here, bus):
        here.start()
        yield here, bus
    rabbitmq.start()
    rabbitmq.delete_vhost("commands")


@pytest.fixture
def alone(tmp_path: Path) -> Site:
    """Give an installation without a broker."""
    return Site(tmp_path, f"amqp://user:{SECRET}@127.0.0.1:{free_port()}/")


def written(here: Site, number: int, content: bytes | None = None) -> Path:
    """Write a record file."""
    record = small(number)
    path = here.records / record.name
    path.write_bytes(record.content if content is None else content)
    return path


# --- publish ---------------------------------------------------------------------------------------------------


def test_publish_waits_for_the_outcomes(world: World) -> None:
    here, _ = world
    files = [written(here, number) for number in range(3)]
    done = here.run("publish", "--wait", *files)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 have their outcome" in done.stdout
    assert done.stdout.count("exported  ") == 3
    assert done.stdout.count("local_archive") == 3
    assert done.stderr == ""  # no progress where nobody looks
    assert all(here.archived(small(number)).exists() for number in range(3))


def test_publish_speaks_json(world: World) -> None:
    here, bus = world
    good, bad = written(here, 10), written(here, 11, b"<Sample/>")
    done = here.run("publish", "--wait", "--json", good, bad, here.records / "none.xml")
    assert done.returncode == 1
    answer = json.loads(done.stdout)
    assert [row["file"] for row in answer["published"]] == [str(good), str(bad)]
    assert len(answer["unusable"]) == 1
    assert "none.xml" in answer["unusable"][0]
    told = {outcome["data"]["cause"]["id"]: outcome["data"]["status"] for outcome in answer["outcomes"]}
    first, second = (row["id"] for row in answer["published"])
    assert told == {first: "COMPLETED", second: "BUILT_NOT_EXPORTED"}
    assert answer["published"][0]["session"] == small(10).session

    again = json.loads(here.run("publish", "--json", good).stdout)
    assert again["published"][0]["id"] == first  # the same build is the same event
    assert answer["outcomes"][0]["id"] in {item.event["id"] for item in bus.heard}


def test_publish_takes_session_destination_and_strategy(world: World, tmp_path: Path) -> None:
    here, _ = world
    outside = tmp_path / "outside.xml"
    outside.write_bytes(small(12).content)
    options = ["--session", "my session", "--destination", "local_archive", "--strategy", "best_effort"]
    done = here.run("publish", "--wait", "--json", outside, *options)
    assert done.returncode == 0, done.stderr
    (outcome,) = json.loads(done.stdout)["outcomes"]
    assert outcome["data"]["session_identifier"] == "my session"
    assert outcome["data"]["strategy"] == "best_effort"
    assert "name" in outcome["data"]["record"]  # it went inside the event

    two = here.run("publish", outside, outside, "--session", "one for two")
    assert (two.returncode, two.stdout) == (2, "")


def test_publish_shows_progress_only_on_a_terminal(world: World) -> None:
    here, _ = world
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "consumer", "publish", written(here, 13), written(here, 14)],
            env={**here.environment(), "TERM": "xterm"},
            cwd=here.folder, stdout=subprocess.PIPE, stderr=theirs, check=False, timeout=30,
        )  # fmt: skip
        shown = os.read(ours, 100_000).decode()
    finally:
        os.close(theirs)
        os.close(ours)
    assert done.returncode == 0
    assert "2/2" in shown
    assert b"2/2" not in done.stdout


def test_publish_without_an_outcome_in_time_fails(tmp_path: Path, amqp_url: str) -> None:
    here = Site(tmp_path, amqp_url)
    done = here.run("publish", "--wait", "--timeout", "0.3", written(here, 1))
    assert done.returncode == 1
    assert "1 of 1 have no outcome" in done.stderr
    with Bus(amqp_url) as bus:
        assert bus.depth() == 1  # it waits for a consumer
        here.start().shut_down()


def test_an_interrupted_wait_ends_with_130(tmp_path: Path, amqp_url: str) -> None:
    here = Site(tmp_path, amqp_url)
    process = subprocess.Popen(
        [sys.executable, "-m", "consumer", "publish", "--wait", str(written(here, 1))],
        env=here.environment(), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        with Bus(amqp_url) as bus:
            wait_for(bus.depth, 10, "the published event")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "Traceback" not in err


# --- export without a broker -----------------------------------------------------------------------------------


def test_export_needs_no_broker(alone: Site, tmp_path: Path) -> None:
    record = small(1)
    path = tmp_path / record.name
    path.write_bytes(record.content)
    done = alone.run("export", path)
    assert done.returncode == 0, done.stderr
    assert record.session in done.stdout
    assert alone.archived(record).read_bytes() == record.content
    (row,) = alone.log_rows(record.session)
    assert (row["destination_name"], bool(row["success"])) == ("local_archive", True)

    again = alone.run("export", path, "--json")
    assert again.returncode == 0, again.stderr
    answer = json.loads(again.stdout)
    assert answer["status"] == "COMPLETED"
    assert len(alone.log_rows(record.session)) == 1  # the same build is not exported twice


def test_export_says_what_is_wrong(alone: Site, tmp_path: Path) -> None:
    path = tmp_path / "bad.xml"
    path.write_bytes(b"<Sample/>")
    done = alone.run("export", path)
    assert done.returncode == 1
    assert "record_wrong_root" in done.stdout
    missing = alone.run("export", tmp_path / "none.xml")
    assert missing.returncode == 1
    assert "none.xml" in missing.stderr
    assert "Traceback" not in done.stderr + missing.stderr


def test_what_export_leaves_in_the_outbox_goes_out_at_the_next_run(tmp_path: Path, amqp_url: str) -> None:
    with site(tmp_path, amqp_url) as (here, bus):
        done = here.run("export", written(here, 1), NX_AMQP_URL="amqp://127.0.0.1:1/")
        assert done.returncode == 0, done.stderr
        (job,) = here.sql("SELECT source, event_id FROM jobs")
        service = here.start()
        outcome = bus.outcome(job["event_id"], log=service.log)
        assert outcome.data["status"] == "COMPLETED"
        assert here.sql("SELECT id FROM jobs")[0]["id"] == str(job_of(job["event_id"], job["source"]))


# --- status, destinations, doctor ------------------------------------------------------------------------------


def test_status_needs_somebody_when_no_consumer_runs(world: World, tmp_path: Path) -> None:
    here, _ = world
    empty = here.run("status", NX_DATABASE_URL=f"sqlite:///{tmp_path}/none.db")
    assert empty.returncode == 1
    assert "nexus-export run" in empty.stderr
    assert not (tmp_path / "none.db").exists()
    assert here.run("db", "upgrade", NX_DATABASE_URL=f"sqlite:///{tmp_path}/new.db").returncode == 0
    idle = here.run("status", NX_DATABASE_URL=f"sqlite:///{tmp_path}/new.db")
    assert idle.returncode == 1
    assert "no consumer is running" in idle.stdout


def test_status_is_healthy_when_all_is_well(world: World) -> None:
    here, _ = world
    here.running[0].wait_for(lambda: here.sql("SELECT * FROM consumers WHERE broker_connected"), "a sign of life")
    done = here.run("status")
    assert done.returncode == 0, done.stdout
    assert "healthy" in done.stdout
    answer = json.loads(here.run("status", "--json").stdout)
    assert answer["healthy"] is True
    assert answer["problems"] == []
    assert answer["queues"]["nexuslims.export"] == 0
    assert len(answer["consumers"]) == 1


def test_destinations_are_listed_with_what_is_wrong(alone: Site) -> None:
    done = alone.run("destinations")
    assert done.returncode == 0
    assert "local_archive" in done.stdout
    assert "NX_CDCS_TOKEN" in done.stdout  # why cdcs is not enabled
    (alone.plugins / "broken.py").write_text("1 / 0", encoding="utf-8")
    broken = alone.run("destinations", "--json")
    assert broken.returncode == 1
    answer = json.loads(broken.stdout)
    assert "ZeroDivisionError" in answer["problems"][0]["message"]
    rows = {row["name"]: row for row in answer["destinations"]}
    assert (rows["local_archive"]["enabled"], rows["local_archive"]["checked"]) == (True, True)
    assert (rows["cdcs"]["enabled"], rows["cdcs"]["checked"]) == (False, None)
    assert rows["cdcs"]["priority"] > rows["local_archive"]["priority"]


def test_doctor_finds_all_well(world: World) -> None:
    here, bus = world
    bus.fetch_letters()  # of other tests
    done = here.run("doctor")
    assert done.returncode == 0, done.stdout
    assert "all well" in done.stdout


def test_doctor_names_what_is_wrong(alone: Site, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    alone.records.rmdir()
    done = alone.run("doctor", "--json", NX_LOCAL_ARCHIVE_PATH=str(tmp_path / "file"), NX_RECRODS_PATH="/x")
    assert done.returncode == 1
    wrong = {finding["what"]: finding for finding in json.loads(done.stdout) if finding["advice"]}
    assert "cannot be reached" in wrong["RabbitMQ"]["state"]
    assert wrong[f"records {alone.records}"]["state"] == "not there"
    assert "is a file" in wrong["destination local_archive"]["state"]
    assert wrong["setting NX_RECRODS_PATH"]["advice"] == "did you mean NX_RECORDS_PATH?"
    assert len(wrong) == 4
    assert SECRET not in done.stdout + done.stderr


# --- settings --------------------------------------------------------------------------------------------------


def test_config_show_tells_origins_and_hides_secrets(alone: Site) -> None:
    env = f"NX_CDCS_TOKEN={SECRET}\nNX_EXPORT_STRATEGY=best_effort\nNX_FILE_STRATEGY=inclusive\n"
    (alone.folder / ".env").write_text(env, encoding="utf-8")
    done = alone.run("config", "show", "--json", NX_EXPORT_STRATEGI="all")
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    rows = {row["name"]: row for row in answer["settings"]}
    assert rows["NX_EXPORT_STRATEGY"]["value"] == "best_effort"
    assert rows["NX_EXPORT_STRATEGY"]["origin"].endswith(".env")
    assert rows["NX_RECORDS_PATH"]["origin"] == "environment"
    assert rows["NX_RECORD_MAX_BYTES"]["origin"] == "default"
    assert answer["unknown"] == {"NX_EXPORT_STRATEGI": "NX_EXPORT_STRATEGY"}
    shown = alone.run("config", "show")
    assert "NX_LOCAL_ARCHIVE_PATH" in shown.stdout
    assert SECRET not in done.stdout + shown.stdout


def test_init_writes_a_private_file_and_keeps_what_is_there(alone: Site, tmp_path: Path) -> None:
    taken = tmp_path / "nexuslims.env"
    lines = ["NX_CDCS_URL='https://cdcs.test/'", "NX_CDCS_TOKEN=a1b2", "NX_CDCS_TEMPLATE_TITLE='Nexus #1'"]
    taken.write_text("\n".join(lines), encoding="utf-8")
    done = alone.run("init", "--from", taken)
    assert done.returncode == 0, done.stderr
    env = alone.folder / ".env"
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    rows = json.loads(alone.run("config", "show", "--json").stdout)["settings"]
    values = {row["name"]: row["value"] for row in rows}
    assert values["NX_CDCS_URL"] == "https://cdcs.test/"
    assert values["NX_CDCS_TOKEN"] == "(set, hidden)"
    assert values["NX_CDCS_TEMPLATE_TITLE"] == "Nexus #1"

    text = env.read_text(encoding="utf-8").replace("# NX_EXPORT_STRATEGY=all", "NX_EXPORT_STRATEGY=best_effort")
    env.write_text(text, encoding="utf-8")
    assert alone.run("init", "--from", taken).returncode == 0
    assert env.read_text(encoding="utf-8") == text
    missing = alone.run("init", "--from", tmp_path / "none.env")
    assert (missing.returncode, "none.env" in missing.stderr) == (2, True)


def test_schema_prints_and_writes_documents(alone: Site, tmp_path: Path) -> None:
    assert '"asyncapi": "3.0.0"' in alone.run("schema").stdout
    done = alone.run("schema", "--write", tmp_path / "reference")
    assert done.returncode == 0
    names = {path.name for path in (tmp_path / "reference").iterdir()}
    assert names == {
        "record.built.schema.json", "record.exported.schema.json", "record.export_failed.schema.json", "asyncapi.json"
    }  # fmt: skip
    for name in names:
        json.loads((tmp_path / "reference" / name).read_bytes())


def test_db_upgrade_says_what_it_did(alone: Site) -> None:
    first, second = alone.run("db", "upgrade"), alone.run("db", "upgrade")
    assert (first.returncode, second.returncode) == (0, 0)
    assert first.stdout.startswith("upgraded from empty")
    assert second.stdout == "up to date\n"


# --- exit codes ------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "command": (["exprot"], {}, "exprot"),
    "option": (["publish", "--sesion", "x"], {}, "--sesion"),
    "argument": (["publish"], {}, "FILES"),
    "strategy": (["status"], {"NX_EXPORT_STRATEGY": "some"}, "NX_EXPORT_STRATEGY 'some' (environment)"),
    "number": (["run"], {"NX_RECORD_MAX_BYTES": "-1"}, "NX_RECORD_MAX_BYTES"),
    "address": (["publish", "x.xml"], {"NX_AMQP_URL": "localhost"}, "NX_AMQP_URL"),
    "database": (["run"], {"NX_DATABASE_URL": "mysql://localhost/x"}, "NX_DATABASE_URL"),
    "no database": (["run"], {"NX_DATABASE_URL": "here"}, "NX_DATABASE_URL"),
    "schema": (["run"], {"NX_RECORD_SCHEMA": "/none.xsd"}, "NX_RECORD_SCHEMA"),
    "env file": (["run"], {"NX_ENV_FILE": "/none.env"}, "NX_ENV_FILE"),
    "secret file": (["run"], {"NX_AMQP_URL": "", "NX_AMQP_URL_FILE": "/none"}, "NX_AMQP_URL_FILE"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_usage_and_settings_end_with_2_and_a_sentence(alone: Site, name: str) -> None:
    arguments, settings, said = WRONG[name]
    done = alone.run(*arguments, **settings)
    assert done.returncode == 2, done.stderr
    assert said.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr


def test_a_broker_that_is_away_ends_publish_with_1_and_a_sentence(alone: Site) -> None:
    done = alone.run("publish", written(alone, 1))
    assert done.returncode == 1
    assert "cannot be reached" in done.stderr
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stderr


def test_help_lists_every_command(alone: Site) -> None:
    done = alone.run("--help")
    assert done.returncode == 0
    assert [name for name in COMMANDS if name not in done.stdout] == []
