"""Who owns a record at a real CDCS: users found, mapped and created, and what a failure leaves."""

import asyncio
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from consumer.destinations.contract import Partial, Present
from tests.integration import cdcs_kit
from tests.integration.cdcs_kit import (
    Between,
    MakeContext,
    MakeDestination,
    Reservation,
    rebuilt,
    stored,
    upload,
)
from tools.servers.cdcs import CdcsServer

between, context_of, make, rest = cdcs_kit.between, cdcs_kit.context_of, cdcs_kit.make, cdcs_kit.rest


async def id_of(rest: httpx.AsyncClient, username: str) -> str | None:
    users = (await rest.get("rest/user/")).json()
    return next((str(user["id"]) for user in users if user["username"] == username), None)


async def test_an_unknown_user_is_created_and_owns_the_record(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination = make(user_owned_records=True)
    kept: dict[str, Any] = {}

    async def save(facts: Any) -> None:
        kept.update(facts)

    name = f"user-{uuid.uuid4().hex[:8]}"
    reservation = Reservation(name, f"{name}@example.org")
    # together, so that both find no user
    contexts = [context_of(index, reservation_event=reservation, save_facts=save) for index in (1, 2)]
    results = await asyncio.gather(*(destination.export(context) for context in contexts))
    users = [user for user in (await rest.get("rest/user/")).json() if user["username"] == name]
    assert [user["email"] for user in users] == [f"{name}@example.org"]
    for result in results:
        assert (result.success, result.metadata) == (True, {})
        assert (await stored(rest, result.record_id))["user_id"] == str(users[0]["id"])
    assert kept["record_id"] in {result.record_id for result in results}
    assert await destination.verify(contexts[0]) == Present(results[0].record_id or "", results[0].record_url)


async def test_a_record_that_was_not_offered_to_its_owner_is_a_part(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination = make(user_owned_records=True)
    context = context_of(reservation_event=Reservation("plain"))
    first = await upload(rest, context.xml_file_path.stem, context.xml_file_path.read_text())  # its answer got lost
    assert await destination.verify(context) == Partial(first)
    context.remembered["record_id"] = first
    assert await destination.verify(context) == Partial(first)
    result = await destination.export(context)
    assert (result.action, result.record_id, result.metadata) == ("created", first, {})
    assert (await stored(rest, first))["user_id"] == await id_of(rest, "plain")
    assert await destination.verify(context) == Present(first, result.record_url)


async def test_the_record_is_remembered_before_it_is_offered(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    saved: list[tuple[list[str], str]] = []

    async def save(facts: Any) -> None:
        saved.append((list(facts), proxy.requests[-1]))

    context = context_of(reservation_event=Reservation("plain"), save_facts=save)
    result = await make(url=url, user_owned_records=True).export(context)
    change = proxy.requests[-1]
    assert change.startswith(f"PATCH /rest/data/{result.record_id}/change-owner/")
    assert saved == [(["record_id"], "POST /rest/data/"), (["offered_to_owner"], change)]


async def test_an_update_leaves_the_owner(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url, user_owned_records=True), context_of(reservation_event=Reservation("plain"))
    result = await destination.export(context)
    del proxy.requests[:]
    newer = rebuilt(context, result)
    again = await destination.export(newer)
    assert (again.action, again.metadata) == ("updated", {})
    assert [request.partition(" ")[0] for request in proxy.requests] == ["GET", "PATCH"]
    assert (await stored(rest, result.record_id))["user_id"] == await id_of(rest, "plain")
    assert await destination.verify(newer) == Present(result.record_id or "", result.record_url)


@pytest.mark.parametrize("text", ["# ours, theirs\nlocal,plain\n", '{"local": "plain"}'])
async def test_a_user_of_another_name_is_found_by_the_file_of_users(
    text: str, *, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext, tmp_path: Path
) -> None:
    path = tmp_path / "users"
    path.write_text(text)
    destination = make(user_owned_records=True, users_file=path)
    assert await destination.validate_config() == (True, None)
    result = await destination.export(context_of(reservation_event=Reservation("local")))
    assert result.metadata == {}
    assert (await stored(rest, result.record_id))["user_id"] == await id_of(rest, "plain")
    assert await id_of(rest, "local") is None


async def test_a_file_of_users_that_is_wrong_does_not_stop_the_export(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext, tmp_path: Path
) -> None:
    path = tmp_path / "users.csv"
    path.write_text("local,nobody-there\n")
    destination, reservation = make(user_owned_records=True, users_file=path), Reservation("local")
    result = await destination.export(context_of(reservation_event=reservation))
    assert "says that local is nobody-there, whom CDCS does not have" in result.metadata["warning"]
    path.write_text("local\n")  # read anew for each record
    result = await destination.export(context_of(reservation_event=reservation))
    assert f"NX_CDCS_USERS_FILE: {path}, line 1: needs" in result.metadata["warning"]
    assert (await stored(rest, result.record_id))["user_id"] == await id_of(rest, "admin")
    assert await id_of(rest, "nobody-there") is None


@pytest.mark.parametrize(
    ("request_", "status", "body", "reason"),
    [
        ("GET /rest/user/", "500 Internal Server Error", {"message": "database is locked"}, "database is locked"),
        ("GET /rest/user/", "403 Forbidden", {"detail": "Invalid token."}, "Could not authenticate"),
        ("GET /rest/user/", "200 OK", {"results": []}, "something unexpected"),
        ("PATCH", "500 Internal Server Error", {"message": "User matching query does not exist."}, "matching query"),
        ("PATCH", "404 Not Found", {"message": "Data or user not found."}, "Data or user not found"),
    ],
)
async def test_a_server_that_does_not_give_the_owner_does_not_stop_the_export(
    request_: str,
    status: str,
    body: object,
    reason: str,
    *,
    between: tuple[Between, str],
    rest: httpx.AsyncClient,
    make: MakeDestination,
    context_of: MakeContext,
) -> None:
    proxy, url = between
    context = context_of(reservation_event=Reservation("plain"))
    first = await upload(rest, context.xml_file_path.stem, context.xml_file_path.read_text())
    context.remembered["record_id"] = first
    if request_ == "PATCH":
        request_ = f"PATCH /rest/data/{first}/change-owner/{await id_of(rest, 'plain')}"
    proxy.answer(request_, status, body)
    result = await make(url=url, user_owned_records=True).export(context)
    assert result.success
    assert reason in result.metadata["warning"]
    assert await make(url=url, user_owned_records=True).verify(context) == Present(first, result.record_url)


async def test_a_user_that_another_task_created_just_before_is_taken(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    proxy.answer("GET /rest/user/", "200 OK", [{"id": 1, "username": "admin", "email": ""}])
    proxy.answer("POST /rest/user/", "500 Internal Server Error", "<h1>Server Error (500)</h1>")
    context = context_of(reservation_event=Reservation("plain"))
    result = await make(url=url, user_owned_records=True).export(context)
    assert result.metadata == {}
    assert (await stored(rest, result.record_id))["user_id"] == await id_of(rest, "plain")


async def test_a_known_user_is_found_by_address(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    reservation = Reservation("plain@university", "PLAIN@example.org")
    result = await make(user_owned_records=True).export(context_of(reservation_event=reservation))
    assert (await stored(rest, result.record_id))["user_id"] == await id_of(rest, "plain")


@pytest.mark.parametrize(
    ("reservation", "admin", "reason"),
    [
        (None, True, "no reservation with a username"),
        (Reservation(None), True, "no reservation with a username"),
        (Reservation("somebody"), False, "do not have permission"),
        (Reservation("not a valid name!"), True, "did not create the user"),
    ],
)
async def test_a_record_without_its_owner_is_exported_all_the_same(
    cdcs: CdcsServer,
    rest: httpx.AsyncClient,
    make: MakeDestination,
    context_of: MakeContext,
    *,
    reservation: Reservation | None,
    reason: str,
    admin: bool,
) -> None:
    destination = make(user_owned_records=True, token=cdcs.admin_token if admin else cdcs.plain_token)
    with capture_logs() as logs:
        result = await destination.export(context_of(reservation_event=reservation))
    assert result.success
    assert result.metadata["warning"].startswith("the owner of the record was not changed: ")
    assert reason in result.metadata["warning"]
    assert [entry["event"] for entry in logs] == ["ownership_not_changed"]
    assert (await stored(rest, result.record_id))["user_id"] in {"1", "2"}
