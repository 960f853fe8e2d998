"""eLabFTW in trouble: answers lost at every step, copies that come late, keys and settings that are wrong."""

import asyncio
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from consumer.destinations.contract import Absent, Answer, ExportContext, Partial, Present, Unsure
from consumer.destinations.elabftw import Elabftw
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient, UnknownOutcome
from consumer.events import Reservation
from consumer.pipeline.attempt import ContextActivity
from consumer.testing.elabftw_accounts import READ_ONLY_KEY, SERVICE_KEY, STRANGER_KEY
from tests.integration import elabftw_kit
from tests.integration.elabftw_kit import PNG, ElabftwServer, Make, context_in, exported, rebuilt
from tools.servers.ports import free_port
from tools.servers.process import wait_for

CDCS_URL = "https://cdcs.example.org/data?id=5"
SECONDS = 15
#: How long the server may still commit, in these tests.
SETTLE_SECONDS = 0.6
SECRET = SERVICE_KEY.partition("-")[2]

running, elab, any_elab, make = elabftw_kit.running, elabftw_kit.elab, elabftw_kit.any_elab, elabftw_kit.make


async def settled(destination: Elabftw, context: ExportContext) -> Answer:
    """Ask as the engine does: until the answer is sure, and what is missing only counts once the server is quiet."""
    async with asyncio.timeout(SECONDS):
        since = asyncio.get_running_loop().time()
        while True:
            answer = await destination.verify(context)
            waited = asyncio.get_running_loop().time() - since
            if isinstance(answer, Present) or (isinstance(answer, Absent | Partial) and waited >= SETTLE_SECONDS):
                return answer
            await asyncio.sleep(0.05)


async def driven(destination: Elabftw, context: ExportContext) -> str:
    """Export as the engine does, whatever happens on the way; return the id."""
    async with asyncio.timeout(SECONDS):
        while True:
            with suppress(Transient):
                try:
                    return (await destination.export(context)).record_id or ""
                except UnknownOutcome:
                    answer = await settled(destination, context)
                    if isinstance(answer, Present):
                        return answer.id


def activity(*previews: Path) -> ContextActivity:
    return ContextActivity((), (), previews, None, None, {})


# --- lost answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["error", "error_after", "cut", "cut_after", "truncate", "late", "rate_limit"])
@pytest.mark.parametrize(
    ("path", "skip"), [("/experiments", 0), ("/tags", 0), ("/tags", 2), ("/uploads", 0), ("/uploads", 1)]
)
async def test_whatever_is_lost_there_is_one_of_everything(
    elab: ElabftwServer, make: Make, tmp_path: Path, *, kind: str, path: str, skip: int
) -> None:
    preview = tmp_path / "a.png"
    preview.write_bytes(PNG)
    context = context_in(tmp_path, user="Ada", activities=[activity(preview)])
    elab.fault(kind, path, skip=skip, status=503, seconds=0.2)
    destination = make()
    assert await driven(destination, context) == "1"
    wait_for(lambda: not elab.state()["pending"], SECONDS, "what comes late")
    (entry,) = elab.experiments()
    assert entry["tags"] == ["NexusLIMS", context.instrument_pid, "Ada"]
    assert [u["real_name"] for u in elab.uploads(None)] == [context.xml_file_path.name, "a.png"]
    assert elab.uploads()[0]["hash"] == context.record_sha256
    assert await destination.verify(context) == Present("1", f"{elab.url}experiments.php?mode=view&id=1")


@pytest.mark.parametrize("kind", ["error", "error_after", "cut", "cut_after", "truncate", "late"])
@pytest.mark.parametrize(("method", "path"), [("PATCH", "/experiments/1"), ("POST", "/uploads/1")])
async def test_an_update_survives_a_lost_answer(
    elab: ElabftwServer, make: Make, tmp_path: Path, *, kind: str, method: str, path: str
) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    elab.fault(kind, path, method=method, status=503, seconds=0.2)
    newer = rebuilt(context, result)
    await driven(destination, newer)
    (entry,) = elab.experiments()
    assert "built this record anew" not in entry["body"]
    (upload,) = elab.uploads()
    assert upload["hash"] == newer.record_sha256
    assert len(elab.uploads(None)) == 2
    # a further build still knows the page for ours
    last = await destination.export(rebuilt(newer, result, index=3))
    assert last.metadata == {}


@pytest.mark.parametrize("kind", ["error_after", "cut_after", "late"])
async def test_an_addition_to_a_persons_page_is_made_once(
    elab: ElabftwServer, make: Make, tmp_path: Path, kind: str
) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    elab.as_owner("1", {"body": "<p>mine</p>"})
    elab.fault(kind, "/experiments/1", method="PATCH", status=504, seconds=0.2)
    newer = rebuilt(context, result, links={"cdcs": CDCS_URL})
    await driven(destination, newer)
    (entry,) = elab.experiments()
    assert entry["body"].startswith("<p>mine</p>")
    assert entry["body"].count(newer.record_sha256) == 1
    assert entry["body"].count(CDCS_URL) == 1
    assert len(elab.uploads()) == 2


async def test_a_lost_link_is_added_once(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    elab.fault("cut_after", "/experiments/1", method="PATCH")
    await driven(destination, exported(context, result, purpose="link", links={"cdcs": CDCS_URL}))
    (entry,) = elab.experiments()
    assert entry["body"].count(CDCS_URL) == 1
    assert len(elab.requests("PATCH")) == 1


async def test_a_create_without_an_answer_is_of_unknown_outcome(
    elab: ElabftwServer, make: Make, tmp_path: Path
) -> None:
    destination = make()
    for kind, answer in (("cut_after", Partial("1")), ("cut", Absent())):
        context = context_in(tmp_path)
        elab.fault(kind, "/experiments")
        with pytest.raises(UnknownOutcome):
            await destination.export(context)
        assert await destination.verify(context) == answer
        assert context.remembered == {}


async def test_a_server_that_does_not_answer(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    elab.fault("stall_after", "/uploads", seconds=1)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.5):
            await destination.export(context)
    assert await destination.verify(context) == Present("1", f"{elab.url}experiments.php?mode=view&id=1")


async def test_a_file_that_may_still_come_is_waited_for(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    elab.fault("late", "/uploads", seconds=0.5)
    with pytest.raises(UnknownOutcome):
        await destination.export(context)
    assert await destination.verify(context) == Partial("1")
    assert await settled(destination, context) == Present("1", f"{elab.url}experiments.php?mode=view&id=1")


async def test_a_refused_create_that_made_it_all_the_same(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    elab.fault("error_after", "/experiments", status=400)
    result = await make().export(context_in(tmp_path))
    assert (result.record_id, len(elab.experiments())) == ("1", 1)


async def test_a_copy_that_comes_too_late_is_found(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    elab.fault("late", "/experiments", seconds=1.5)
    record_id = await driven(destination, context)
    wait_for(lambda: not elab.state()["pending"], SECONDS, "the late copy")
    assert len(elab.experiments()) == 2
    answer = await destination.verify(replace(context, purpose="recheck"))
    assert answer == Present(record_id, f"{elab.url}experiments.php?mode=view&id={record_id}", ("2",))


async def test_an_attachment_that_came_out_empty_is_replaced(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    with elab.client(SERVICE_KEY) as client:
        elab.fault("cut", "/uploads")
        with pytest.raises(UnknownOutcome):
            await destination.export(context)
        comment = f"NexusLIMS XML record, sha256 {context.record_sha256}"
        files = {"file": (context.xml_file_path.name, b"", "text/xml")}
        assert client.post("experiments/1/uploads", files=files, data={"comment": comment}).status_code == 201
    await destination.export(context)
    assert [u["hash"] for u in elab.uploads()] == [context.record_sha256]
    assert [u["state"] for u in elab.uploads(None)] == [2, 1]


async def test_an_attachment_that_never_came_is_sent_again(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    elab.fault("error", "/uploads", status=201)
    with pytest.raises(UnknownOutcome, match="has not got the attachment"):
        await destination.export(context)
    assert await destination.verify(context) == Partial("1")
    await destination.export(context)
    assert [u["hash"] for u in elab.uploads()] == [context.record_sha256]


async def test_an_owner_is_set_after_a_lost_answer(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination = make(user_owned_records=True)
    context = context_in(tmp_path, reservation_event=Reservation(user_email="ada@example.org"))
    elab.fault("cut_after", "/uploads")
    await driven(destination, context)
    assert elab.experiments()[0]["userid"] == 2


# --- whose it is -----------------------------------------------------------------------------------------------


async def test_a_lost_database_finds_its_copies_again(any_elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    await destination.export(context)
    context.remembered.clear()
    again = await destination.export(context)
    assert (again.record_id, again.action) == ("1", "created")
    assert len(any_elab.experiments()) == len(any_elab.uploads()) == 1


async def test_a_persons_duplicate_is_none_of_ours(any_elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    with any_elab.client() as client:
        assert client.post("experiments/1", json={"action": "duplicate"}).status_code == 201
    answer = await destination.verify(replace(exported(context, result), purpose="recheck"))
    assert answer == Present("1", result.record_url)
    with any_elab.client(SERVICE_KEY) as client:
        client.delete("experiments/1")
    assert await destination.verify(replace(exported(context, result), purpose="recheck")) == Absent()


async def test_an_experiment_without_its_key_is_still_there(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    elab.as_owner("1", {"metadata": "{}"})
    answer = await destination.verify(replace(exported(context, result), purpose="recheck"))
    assert answer == Present("1", result.record_url)
    elab.as_owner("1", {"state": 3})
    assert await destination.verify(replace(exported(context, result), purpose="recheck")) == Absent()


async def test_somebody_elses_bytes_under_our_key_are_a_conflict(
    elab: ElabftwServer, make: Make, tmp_path: Path
) -> None:
    destination, context = make(), context_in(tmp_path)
    extra = {"Record key": {"type": "text", "value": context.record_key.replace("-", "")}}
    with elab.client() as client:
        client.post("experiments", json={"title": "theirs", "metadata": {"extra_fields": extra}})
    for call in (destination.export, destination.verify):
        with pytest.raises(Permanent, match=r"id=1 has the key of this record") as caught:
            await call(context)
        assert caught.value.code == "conflict"
    assert len(elab.experiments()) == 1


@pytest.mark.usefixtures("elab")
async def test_a_key_that_matches_by_wildcard_is_not_ours(make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    await destination.export(context)
    other = context_in(tmp_path, record_key=context.record_key.replace("-", "")[:-1] + "_")
    assert await destination.verify(other) == Absent()


# --- refusals --------------------------------------------------------------------------------------------------


async def told(destination: Elabftw, context: ExportContext) -> DestinationError:
    """Return what an export raises; it holds no secret."""
    with pytest.raises(DestinationError) as caught:
        await destination.export(context)
    assert SECRET not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({}, "3-" + "0" * 40, "authentication failed"),
        ({}, READ_ONLY_KEY, "is a read-only key: make one"),
        ({"force_template": True}, SERVICE_KEY, "forces experiments to be made from a template"),
        ({"create_forbidden": True}, SERVICE_KEY, "may not create experiments in its team"),
    ],
)
@pytest.mark.parametrize("version", elabftw_kit.VERSIONS)
async def test_what_a_person_has_to_mend(
    running: ElabftwServer, make: Make, tmp_path: Path, *, version: str, settings: Any, key: str, words: str
) -> None:
    running.reset(version=version, **settings)
    error = await told(make(api_key=key), context_in(tmp_path))
    assert isinstance(error, Misconfigured)
    assert words in str(error)
    assert running.experiments() == []


@pytest.mark.usefixtures("elab")
async def test_a_wrong_key_answers_no_look_up(make: Make, tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="put a valid API key of eLabFTW into NX_ELABFTW_API_KEY"):
        await make(api_key="0" * 32).verify(context_in(tmp_path))


async def test_an_address_without_elabftw(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    for facts in ({}, {"record_id": "1"}):  # a page that is not there is no experiment that was deleted
        error = await told(make(url=f"{elab.url}elsewhere/"), context_in(tmp_path, remembered=dict(facts)))
        assert isinstance(error, Misconfigured)
        assert "check NX_ELABFTW_URL" in str(error)
    error = await told(make(url=f"http://127.0.0.1:{free_port()}"), context_in(tmp_path))
    assert (type(error), error.code) == (Transient, "cannot_connect")


@pytest.mark.parametrize("date", [False, True])
async def test_a_server_that_asks_to_wait(elab: ElabftwServer, make: Make, tmp_path: Path, *, date: bool) -> None:
    elab.fault("rate_limit", "/experiments", retry_after=30, date=date)
    error = await told(make(), context_in(tmp_path))
    assert isinstance(error, Transient)
    assert error.retry_after == pytest.approx(30, abs=1)


async def test_a_record_that_is_too_large(running: ElabftwServer, make: Make, tmp_path: Path) -> None:
    running.reset(max_upload_bytes=7_000)
    context = context_in(tmp_path)
    context.xml_file_path.write_bytes(b"<x>" + bytes(range(32, 48)) * 500 + b"</x>")
    error = await told(make(), context)
    assert (type(error), error.code) == (Permanent, "too_large")
    assert "413" in str(error)
    assert len(running.experiments()) == 1


async def test_a_page_that_is_too_large(elab: ElabftwServer, make: Make, tmp_path: Path) -> None:
    names = tuple(f"{number:080}.tif" for number in range(50_000))
    context = context_in(tmp_path, activities=[ContextActivity(names, names, (), None, None, {})])
    error = await told(make(), context)
    assert (type(error), error.code) == (Permanent, "too_large")
    assert elab.experiments() == []


async def test_an_experiment_that_somebody_edits_is_tried_later(
    elab: ElabftwServer, make: Make, tmp_path: Path
) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    elab.as_owner("1", {"canwrite_base": 30})
    with elab.client() as client:
        client.patch("experiments/1", json={"action": "exclusiveeditmode"}).raise_for_status()
        error = await told(destination, rebuilt(context, result))
        assert (type(error), error.code) == (Transient, "being_edited")
        client.patch("experiments/1", json={"action": "exclusiveeditmode"}).raise_for_status()
    assert (await destination.export(rebuilt(context, result))).action == "updated"


async def test_an_experiment_that_is_locked_while_we_write(
    any_elab: ElabftwServer, make: Make, tmp_path: Path
) -> None:
    destination, context = make(), context_in(tmp_path)
    any_elab.fault("error", "/uploads", status=403)
    error = await told(destination, context)
    assert (type(error), error.code) == (Permanent, "not_permitted")
    any_elab.as_owner("1", {"action": "lock"})
    error = await told(destination, context)
    assert (type(error), error.code) == (Permanent, "locked")


@pytest.mark.parametrize("version", ["5.3.6", "6.0.0"])
async def test_an_experiment_that_is_archived_while_we_write(
    running: ElabftwServer, make: Make, tmp_path: Path, version: str
) -> None:
    running.reset(version=version)
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    newer, api = rebuilt(context, result), destination._api  # noqa: SLF001 - to archive between two requests
    entry = await api.entry("1")
    running.as_owner("1", {"action": "archive"})
    with pytest.raises(Permanent, match="archived or deleted") as caught:
        await api.patch("1", {"title": "x"})
    assert caught.value.code == "archived"
    assert entry is not None
    assert (await told(destination, newer)).code == "archived"


@pytest.mark.usefixtures("elab")
async def test_an_experiment_of_another_team_is_not_ours_to_read(make: Make, tmp_path: Path) -> None:
    destination, context = make(), context_in(tmp_path)
    result = await destination.export(context)
    stranger = make(api_key=STRANGER_KEY)
    with pytest.raises(Permanent, match="may not read experiment 1") as caught:
        await stranger.export(rebuilt(context, result))
    assert caught.value.code == "not_permitted"
    answer = await stranger.verify(rebuilt(context, result))
    assert isinstance(answer, Unsure)
    assert "may not read experiment 1" in answer.reason


@pytest.mark.usefixtures("elab")
async def test_a_record_that_is_gone(make: Make, tmp_path: Path) -> None:
    context = context_in(tmp_path)
    context.xml_file_path.unlink()
    error = await told(make(), context)
    assert (type(error), error.code) == (Transient, "record_unreadable")


# --- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("server", "settings", "words"),
    [
        ({}, {"api_key": ""}, "NX_ELABFTW_API_KEY is empty"),
        ({}, {"url": None}, "NX_ELABFTW_URL not configured"),
        ({}, {"api_key": "1-00"}, "eLabFTW authentication failed"),
        ({}, {"api_key": READ_ONLY_KEY}, "read-only key: make one with read/write permission"),
        ({}, {"experiment_category": 7}, "EXPERIMENT_CATEGORY is 7, but the key's team has only: 1 (Microscopy), 2"),
        ({}, {"experiment_status": 9}, "EXPERIMENT_STATUS is 9, but the key's team has only: 1 (Running), 2"),
        ({"version": "5.2.0"}, {}, "eLabFTW 5.2 is too old: update it to 5.3 or later"),
        ({"force_template": True}, {}, "forces experiments to be made from a template"),
        ({}, {"users_file": Path("/nowhere/users.csv")}, "NX_ELABFTW_USERS_FILE: /nowhere/users.csv cannot be read"),
    ],
)
async def test_settings_that_are_wrong_are_told_in_words(
    running: ElabftwServer, make: Make, server: dict[str, Any], settings: dict[str, Any], words: str
) -> None:
    running.reset(**server)
    valid, message = await make(**settings).validate_config()
    assert not valid
    assert words in (message or "")
    assert SECRET not in (message or "")


async def test_settings_that_are_right(any_elab: ElabftwServer, make: Make) -> None:
    destination = make(experiment_category=2, experiment_status=1)
    assert await destination.validate_config() == (True, None)
    assert any_elab.requests("POST") == []


async def test_an_address_where_nothing_answers_is_told(make: Make) -> None:
    valid, message = await make(url=f"http://127.0.0.1:{free_port()}").validate_config()
    assert not valid
    assert "eLabFTW configuration error: cannot connect to 127.0.0.1" in (message or "")
