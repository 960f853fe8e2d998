"""Exports to a server that behaves like eLabFTW: what arrives there, and what its official client sees of it."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import elabapi_python  # type: ignore[import-untyped]
import pytest

from consumer.destinations.contract import Absent, ExportResult, Partial, Present
from consumer.errors import Permanent
from consumer.events import Reservation
from consumer.pipeline.attempt import ContextActivity
from consumer.testing.elabftw_accounts import ADMIN_KEY, PERSON_KEY, SERVICE_KEY
from tests.integration import elabftw_kit
from tests.integration.elabftw_kit import PNG, ElabftwServer, Make, context_in, exported, rebuilt
from tests.integration.harness import built, site, small

CDCS_URL = "https://cdcs.example.org/data?id=5"

running, elab, any_elab, make = elabftw_kit.running, elabftw_kit.elab, elabftw_kit.any_elab, elabftw_kit.make


def activity(*previews: Path | None) -> ContextActivity:
    return ContextActivity(("/data/a.tif",), ("titan/a.tif",), previews, None, None, {})


def fields(entry: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(entry["metadata"])["extra_fields"]
    return {name: field["value"] for name, field in found.items()}


# --- create ----------------------------------------------------------------------------------------------------


async def test_a_record_becomes_one_experiment(any_elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination = make(experiment_category=1, experiment_status=2)
    context = context_in(tmp_path, user="Ada Lovelace", activities=[activity()], links={"cdcs": CDCS_URL})
    assert await destination.verify(context) == Absent()
    result = await destination.export(context)
    (entry,) = any_elab.experiments()
    assert (result.success, result.action, result.record_id) == (True, "created", "1")
    assert result.record_url == f"{any_elab.url}experiments.php?mode=view&id=1"
    assert result.metadata == {}
    assert entry["title"] == f"NexusLIMS Experiment - {context.xml_file_path.stem}"
    assert (entry["content_type"], entry["category"], entry["status"]) == (1, 1, 2)
    assert entry["tags"] == ["NexusLIMS", context.instrument_pid, "Ada Lovelace"]
    assert "<h1>NexusLIMS Microscopy Session</h1>" in entry["body"]
    assert f'<a href="{CDCS_URL}">View in CDCS</a>' in entry["body"]
    assert "<li>titan/a.tif</li>" in entry["body"]
    assert fields(entry)["Record key"] == context.record_key.replace("-", "")
    assert fields(entry)["CDCS Record"] == CDCS_URL
    assert fields(entry)["Record SHA-256"] == context.record_sha256
    (upload,) = any_elab.uploads()
    assert (upload["real_name"], upload["hash"]) == (context.xml_file_path.name, context.record_sha256)
    assert upload["comment"] == f"NexusLIMS XML record, sha256 {context.record_sha256}"
    assert await destination.verify(context) == Present("1", result.record_url)


async def test_tags_are_not_sent_with_the_experiment(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    await make().export(context_in(tmp_path))
    (sent,) = elab.sent("POST", "/experiments")
    assert set(sent) == {"title", "body", "content_type", "metadata"}
    assert isinstance(sent["metadata"], dict)
    assert next(tag["tag"] for tag in elab.sent("POST", "/tags")) == "NexusLIMS"


async def test_html_that_an_old_server_took_for_markdown_is_put_right(
    running: ElabftwServer, make: Make, tmp_path: Path
) -> None:
    running.reset(version="5.3.6", use_markdown=True)
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    (entry,) = running.experiments()
    assert entry["content_type"] == 1
    assert [list(sent) for sent in running.sent("PATCH", "/experiments/1")] == [["content_type", "body", "metadata"]]
    assert await destination.verify(context) == Present("1", result.record_url)
    newer = rebuilt(context, result)
    assert (await destination.export(newer)).action == "updated"
    assert running.experiments()[0]["body"] != entry["body"]


async def test_previews_become_files(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    first, second, missing = tmp_path / "a.png", tmp_path / "other" / "a.png", tmp_path / "gone.png"
    second.parent.mkdir()
    first.write_bytes(PNG)
    second.write_bytes(PNG + b"2")
    context = context_in(tmp_path, activities=[activity(first, None, missing, second)])
    destination = make()
    result = await destination.export(context)
    assert [u["real_name"] for u in elab.uploads()] == [context.xml_file_path.name, "a.png", "a.png"]
    assert "preview gone.png cannot be read" in result.metadata["warning"]
    assert await destination.verify(context) == Present("1", result.record_url)


async def test_a_preview_that_is_refused_does_not_stop_the_record(
    running: ElabftwServer, make: Make, tmp_path: Path
) -> None:
    running.reset(max_upload_bytes=8_000)
    preview = tmp_path / "large.png"
    preview.write_bytes(bytes(20_000))
    result = await make().export(context_in(tmp_path, activities=[activity(preview)]))
    assert result.success
    assert "refused the file large.png of experiment 1: 413" in result.metadata["warning"]


async def test_tags_that_the_team_forbids_are_a_warning(running: ElabftwServer, make: Make, tmp_path: Path) -> None:
    running.reset(tags_forbidden=True)
    result = await make().export(context_in(tmp_path))
    assert result.success
    assert "Users cannot create tags" in result.metadata["warning"]
    assert len(running.experiments()) == 1
    assert len(running.uploads()) == 1


# --- update ----------------------------------------------------------------------------------------------------


async def test_a_newer_build_updates_what_nobody_changed(any_elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path, user="Ada")
    result = await destination.export(context)
    before = any_elab.experiments()[0]
    newer = rebuilt(context, result)
    assert await destination.verify(newer) == Partial("1")
    again = await destination.export(newer)
    assert (again.action, again.record_id, again.metadata) == ("updated", "1", {})
    (entry,) = any_elab.experiments()
    assert entry["body"] != before["body"]
    assert fields(entry)["Record SHA-256"] == newer.record_sha256
    (upload,) = any_elab.uploads()
    assert upload["hash"] == newer.record_sha256
    assert [u["hash"] for u in any_elab.uploads(None)] == [context.record_sha256, newer.record_sha256]
    assert await destination.verify(newer) == Present("1", result.record_url)


async def test_a_purifier_that_takes_words_out_is_no_person(
    running: ElabftwServer, make: Make, tmp_path: Path
) -> None:
    running.reset(purified_word="Microscopy")
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    newer = rebuilt(context, result)
    again = await destination.export(newer)
    assert [r.metadata for r in (result, again)] == [{}, {}]
    assert "built this record anew" not in running.experiments()[0]["body"]
    same = await destination.export(exported(newer, again))
    assert (same.action, same.metadata, same.stored_sha256) == ("unchanged", {}, again.stored_sha256)
    assert (await destination.export(rebuilt(newer, same, index=3))).metadata == {}


async def test_nothing_new_writes_nothing(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    posts = elab.requests("POST")
    again = await destination.export(exported(context, result))
    assert (again.action, again.stored_sha256) == ("unchanged", result.stored_sha256)
    assert elab.requests("POST") == posts
    assert elab.requests("PATCH") == []


@pytest.mark.parametrize("change", [{"title": "my title"}, {"bodyappend": "<p>my notes</p>"}, {"body": "all mine"}])
async def test_what_a_person_wrote_stays(
    any_elab: ElabftwServer, make: Make, tmp_path: Path, change: dict[str, str]
) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    mine = any_elab.as_owner("1", change)
    newest = newer = rebuilt(context, result)
    again = await destination.export(newer)
    assert "a person has changed the page" in again.metadata["warning"]
    (entry,) = any_elab.experiments()
    assert entry["title"] == mine["title"]
    assert entry["body"].startswith(mine["body"])
    assert entry["body"].count(newer.record_sha256) == 1
    assert fields(entry)["Record SHA-256"] == newer.record_sha256
    assert [u["hash"] for u in any_elab.uploads()] == [context.record_sha256, newer.record_sha256]
    assert await destination.verify(newer) == Present("1", result.record_url)
    # the person's page is theirs from now on, though our paragraph was the last to be written
    newest = rebuilt(newer, again, index=3)
    await destination.export(newest)
    (entry,) = any_elab.experiments()
    assert entry["body"].startswith(mine["body"])
    assert entry["body"].count("NexusLIMS built this record anew") == 2


async def test_formatting_alone_is_a_persons_work_too(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    body = elab.experiments()[0]["body"].replace("Session Details", "<em>Session Details</em>")
    elab.as_owner("1", {"body": body})
    await destination.export(rebuilt(context, result))
    assert elab.experiments()[0]["body"].startswith(body)


async def test_a_page_that_a_person_made_markdown_gets_text(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    elab.as_owner("1", {"content_type": 2, "body": "# my page"})
    newer = rebuilt(context, result, links={"cdcs": CDCS_URL})
    await destination.export(newer)
    body = elab.experiments()[0]["body"]
    assert body.startswith("# my page\n\nNexusLIMS built this record anew")
    assert body.count(CDCS_URL) == 1
    assert "<p>" not in body


async def test_a_persons_extra_fields_stay(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path, user="Ada")
    result = await destination.export(context)
    metadata = json.loads(elab.experiments()[0]["metadata"])
    metadata["extra_fields"]["Temperature"] = {"type": "number", "value": "77"}
    metadata["extra_fields"]["Instrument"]["value"] = "the new one"
    del metadata["extra_fields"]["User"]
    elab.as_owner("1", {"metadata": json.dumps(metadata)})
    newer = rebuilt(context, result)
    await destination.export(newer)
    found = fields(elab.experiments()[0])
    assert (found["Temperature"], found["Instrument"], "User" in found) == ("77", "the new one", False)
    assert found["Record SHA-256"] == newer.record_sha256


async def test_tags_that_a_person_took_away_stay_away(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    with elab.client(SERVICE_KEY) as client:
        client.delete("experiments/1/tags")
    await destination.export(rebuilt(context, result))
    assert elab.experiments()[0]["tags"] == []


async def test_an_attachment_that_a_person_replaced_stays(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    comment = elab.uploads()[0]["comment"]
    with elab.client(SERVICE_KEY) as client:
        files = {"file": ("mine.xml", b"<mine/>", "text/xml")}
        client.post("experiments/1/uploads/1", files=files, data={"action": "replace", "comment": comment})
    newer = rebuilt(context, result)
    await destination.export(newer)
    assert [u["real_name"] for u in elab.uploads()] == ["mine.xml", newer.xml_file_path.name]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"action": "lock"}, ("locked", "experiment 1 is locked in eLabFTW")),
        ({"action": "archive"}, ("archived", "unarchive it there, then replay")),
        ({"state": 3}, ("deleted", "experiment 1 was deleted in eLabFTW")),
    ],
)
async def test_what_may_not_be_written_is_told_in_words(
    any_elab: ElabftwServer, make: Make, tmp_path: Path, change: dict[str, Any], told: tuple[str, str]
) -> None:
    code, words = told
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    any_elab.as_owner("1", change)
    newer = rebuilt(context, result)
    with pytest.raises(Permanent, match=words) as caught:
        await destination.export(newer)
    assert caught.value.code == code
    assert result.record_url is not None
    assert result.record_url in str(caught.value)
    assert any_elab.uploads()[0]["hash"] == context.record_sha256


async def test_an_archived_experiment_that_lacks_nothing_is_fine(
    elab: ElabftwServer, make: Make, tmp_path: Path
) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    elab.as_owner("1", {"action": "archive"})
    assert await destination.verify(context) == Present("1", result.record_url)
    assert (await destination.export(exported(context, result))).action == "unchanged"


async def test_what_a_person_deleted_is_not_made_again(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    await destination.export(context)
    with elab.client(SERVICE_KEY) as client:
        assert client.delete("experiments/1").status_code == 204
    for _ in range(2):
        for call in (destination.export, destination.verify):
            with pytest.raises(Permanent, match="was deleted in eLabFTW") as caught:
                await call(context)
            assert caught.value.code == "deleted"
        context.remembered.clear()
    assert len(elab.experiments()) == 1


# --- links -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [False, True])
async def test_a_late_link_is_added_and_nothing_else(
    any_elab: ElabftwServer, make: Make, tmp_path: Path, *, changed: bool
) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    if changed:
        any_elab.as_owner("1", {"body": "<p>my own page</p>"})
    posts = any_elab.requests("POST")
    late = exported(context, result, purpose="link", links={"cdcs": CDCS_URL})
    assert await destination.verify(late) == Partial("1")
    linked = await destination.export(late)
    assert linked.action == "linked"
    (entry,) = any_elab.experiments()
    assert entry["body"].count(f'<a href="{CDCS_URL}">View in CDCS</a>') == 1
    assert entry["body"].startswith("<p>my own page</p>" if changed else "<h1>")
    assert fields(entry)["CDCS Record"] == CDCS_URL
    assert any_elab.requests("POST") == posts
    assert await destination.verify(late) == Present("1", result.record_url)
    # and an update after it knows whose page it is
    await destination.export(rebuilt(late, linked, links=late.links))
    assert any_elab.experiments()[0]["body"].startswith("<p>my own page</p>" if changed else "<h1>")
    assert any_elab.experiments()[0]["body"].count(CDCS_URL) == 1


async def test_a_late_link_brings_no_file_back(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    with elab.client(SERVICE_KEY) as client:
        client.delete("experiments/1/uploads/1")
    late = exported(context, result, purpose="link", links={"cdcs": CDCS_URL})
    assert (await destination.export(late)).action == "linked"
    assert await destination.verify(late) == Present("1", result.record_url)
    assert elab.uploads() == []


async def test_a_link_that_is_there_is_not_added_twice(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination = make()
    context = context_in(
        tmp_path, previous_results={"cdcs": ExportResult(success=True, destination_name="cdcs", record_url=CDCS_URL)}
    )
    result = await destination.export(context)
    await destination.export(exported(context, result, purpose="link", links={"cdcs": CDCS_URL}))
    assert elab.requests("PATCH") == []


# --- ownership -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reservation",
    [Reservation(user_email="ADA@example.org"), Reservation(username="ada@example.org")],
)
async def test_the_sessions_user_gets_the_experiment(
    any_elab: ElabftwServer, make: Make, tmp_path: Path, reservation: Reservation
) -> None:
    destination = make(user_owned_records=True)
    context = context_in(tmp_path, reservation_event=reservation)
    result = await destination.export(context)
    (entry,) = any_elab.experiments()
    assert result.metadata == {}
    if entry["userid"] == 1:  # before version 6
        assert 2 in json.loads(entry["canwrite"])["users"]
        assert 2 in json.loads(entry["canread"])["users"]
    else:
        assert entry["userid"] == 2
    # the service can still write to it
    newer = rebuilt(context, result)
    assert (await destination.export(newer)).action == "updated"
    assert await destination.verify(newer) == Present("1", result.record_url)


async def test_an_administrators_key_finds_internal_ids(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    context = context_in(tmp_path, user="alovelace")
    await make(user_owned_records=True, api_key=ADMIN_KEY).export(context)
    assert elab.experiments()[0]["userid"] == 2


async def test_a_file_may_say_who_is_whom(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    users = tmp_path / "users.csv"
    users.write_text("username,userid\nada,2\n", encoding="utf-8")
    await make(user_owned_records=True, users_file=users).export(context_in(tmp_path, user="ada"))
    assert elab.experiments()[0]["userid"] == 2


@pytest.mark.parametrize(
    ("user", "words"),
    [("nobody", "no user for the session's user (nobody)"), ("somebody@example.org", "must belong to the team")],
)
async def test_without_a_user_the_service_keeps_it(
    elab: ElabftwServer, make: Make, tmp_path: Path, user: str, words: str
) -> None:
    result = await make(user_owned_records=True).export(context_in(tmp_path, user=user))
    assert result.success
    assert words in result.metadata["warning"]
    assert elab.experiments()[0]["userid"] == 1


# --- the official client ---------------------------------------------------------------------------------------


@dataclass
class Official:
    """The interfaces of elabapi-python that are used here."""

    experiments: Any
    tags: Any
    uploads: Any


@pytest.fixture
def official(elab: ElabftwServer) -> Iterator[Official]:
    configuration = elabapi_python.Configuration()
    configuration.host = f"{elab.url}api/v2"
    client = elabapi_python.ApiClient(configuration)
    client.set_default_header("Authorization", PERSON_KEY)
    yield Official(
        elabapi_python.ExperimentsApi(client), elabapi_python.TagsApi(client), elabapi_python.UploadsApi(client)
    )
    client.pool.close()
    client.pool.join()


def test_the_official_client_works_with_the_server(official: Official, tmp_path: Path) -> None:
    body = {"title": "by hand", "body": "<p>text</p>", "metadata": {"extra_fields": {"k": {"value": "v"}}}}
    _, status, headers = official.experiments.post_experiment_with_http_info(body=body)
    number = int(headers["Location"].rpartition("/")[2])
    assert status == 201
    official.tags.post_tag("experiments", number, body={"tag": "mine"})
    file = tmp_path / "notes.txt"
    file.write_text("notes", encoding="utf-8")
    official.uploads.post_upload("experiments", number, file=str(file), comment="my notes")
    (found,) = official.experiments.read_experiments(extended='extrafield:s:"k":"v"', scope=3)
    entry = official.experiments.get_experiment(number)
    assert (found.id, entry.title, entry.body, entry.tags) == (number, "by hand", "<p>text</p>", "mine")
    assert [(u.real_name, u.comment, u.filesize) for u in entry.uploads] == [("notes.txt", "my notes", 5)]
    official.experiments.patch_experiment({"title": "renamed"}, number)
    assert official.experiments.get_experiment(number).title == "renamed"
    official.experiments.delete_experiment(number)
    assert official.experiments.get_experiment(number).state == 3


async def test_the_official_client_reads_what_we_wrote(official: Official, make: Make, tmp_path: Path) -> None:
    context = context_in(tmp_path, user="Ada", links={"cdcs": CDCS_URL})
    result = await make(experiment_category=1).export(context)
    key = context.record_key.replace("-", "")
    (found,) = official.experiments.read_experiments(extended=f'extrafield:s:"Record key":"{key}"', scope=3, full=1)
    entry = official.experiments.get_experiment(int(result.record_id or 0))
    assert found.id == entry.id
    assert entry.title == f"NexusLIMS Experiment - {context.xml_file_path.stem}"
    assert entry.tags.split("|") == ["NexusLIMS", context.instrument_pid, "Ada"]
    assert entry.category_title == "Microscopy"
    # its model takes metadata for an object, which the server sends as text
    raw = official.experiments.get_experiment(entry.id, _preload_content=False)
    assert fields(json.loads(raw.data))["CDCS Record"] == CDCS_URL
    (upload,) = official.uploads.read_uploads("experiments", entry.id)
    assert upload.hash == context.record_sha256
    content = official.uploads.read_upload(
        "experiments", entry.id, upload.id, format="binary", _preload_content=False
    )
    assert content.data == context.xml_file_path.read_bytes()


# --- the service -----------------------------------------------------------------------------------------------


def test_the_service_exports_there_and_updates(elab: ElabftwServer, tmp_path: Path, amqp_url: str) -> None:
    settings: Any = {
        "NX_ELABFTW_URL": elab.url,
        "NX_ELABFTW_API_KEY": SERVICE_KEY,
        "NX_ELABFTW_EXPERIMENT_CATEGORY": "1",
    }
    with site(tmp_path, amqp_url, **settings) as (here, bus):
        service = here.start()
        record = small(1)
        first = built(record.session, here.write(record))
        bus.publish(first)
        outcome = bus.outcome(first["id"], log=service.log)
        result = outcome.result("elabftw")
        assert (result["success"], result["action"], result["record_id"]) == (True, "created", "1")
        newer = small(1, size=4_000)
        second = built(record.session, here.write(newer))
        bus.publish(second)
        result = bus.outcome(second["id"], log=service.log).result("elabftw")
        assert (result["success"], result["action"], result["record_id"]) == (True, "updated", "1")
        (upload,) = elab.uploads()
        assert upload["filesize"] == len(newer.content)
        assert len(elab.experiments()) == 1
        assert SERVICE_KEY.partition("-")[2] not in service.logged()


def test_the_service_finds_out_what_became_of_a_lost_answer(
    elab: ElabftwServer, tmp_path: Path, amqp_url: str
) -> None:
    settings: Any = {
        "NX_ELABFTW_URL": elab.url,
        "NX_ELABFTW_API_KEY": SERVICE_KEY,
        "NX_ELABFTW_SETTLE_SECONDS": "1",
    }
    elab.fault("cut_after", "/experiments", times=2)
    with site(tmp_path, amqp_url, **settings) as (here, bus):
        service = here.start()
        records = [small(index) for index in (1, 2)]
        events = [built(record.session, here.write(record)) for record in records]
        for event in events:
            bus.publish(event)
        results = [bus.outcome(event["id"], log=service.log).result("elabftw") for event in events]
        assert [result["success"] for result in results] == [True, True]
        assert len(elab.experiments()) == len(elab.uploads()) == 2
