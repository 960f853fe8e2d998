"""The public workspace of a real CDCS: whether a record lies there is checked, and mended."""

import re
from typing import Any

import httpx
import pytest

from consumer.destinations.contract import Partial, Present
from consumer.errors import DestinationError, Misconfigured, Permanent, UnknownOutcome
from tests.integration import cdcs_kit
from tests.integration.cdcs_kit import (
    WORKSPACES,
    Between,
    MakeContext,
    MakeDestination,
    rebuilt,
    stored,
    titled,
    upload,
)

between, context_of, make, rest = cdcs_kit.between, cdcs_kit.context_of, cdcs_kit.make, cdcs_kit.rest


async def test_without_assignment_a_record_stays_private(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    result = await make(url=url, assign_to_public_workspace=False).export(context_of())
    assert "GET /rest/workspace/read_access/" not in proxy.requests
    assert (await stored(rest, result.record_id))["workspace"] is None


async def test_no_public_workspace_waits_for_a_person(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    for _ in range(2):
        proxy.answer(f"GET {WORKSPACES}", "200 OK", [{"id": 7, "title": "x", "is_public": False}])
    sentence = r"CDCS has no public workspace .* make a workspace public there, or set NX_CDCS_ASSIGN_TO_PUBLIC_WOR"
    with pytest.raises(Misconfigured, match=sentence):
        await destination.export(context)
    valid, message = await destination.validate_config()
    assert not valid
    assert re.search(sentence, message or "")
    assert await titled(rest, context.xml_file_path.stem) == []
    assert (await stored(rest, (await destination.export(context)).record_id))["workspace"] == 1


async def test_a_record_without_its_workspace_is_a_part_and_gets_it(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    stem = context.xml_file_path.stem
    first = await upload(rest, stem, context.xml_file_path.read_text(), workspace=None)
    assert await destination.verify(context) == Partial(first)
    context.remembered["record_id"] = first
    assert await destination.verify(context) == Partial(first)
    result = await destination.export(context)
    assert (result.action, result.record_id) == ("created", first)
    assert [request for request in proxy.requests if request.startswith("PATCH")] == [
        f"PATCH /rest/data/{first}/assign/1"
    ]
    assert "POST /rest/data/" not in proxy.requests
    assert (await stored(rest, first))["workspace"] == 1
    assert await destination.verify(context) == Present(first, f"{url}data?id={first}")


async def test_a_workspace_that_a_create_did_not_take_is_given_at_once(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    kept: dict[str, Any] = {}

    async def save(facts: Any) -> None:
        kept.update(facts, requests=list(proxy.requests))

    context = context_of(save_facts=save)
    content = context.xml_file_path.read_text()
    first = await upload(rest, context.xml_file_path.stem, content, workspace=None)
    proxy.answer("POST /rest/data/", "201 Created", await stored(rest, first))
    result = await make(url=url).export(context)
    assert result.record_id == kept["record_id"] == first
    assert proxy.requests[-1] == f"PATCH /rest/data/{first}/assign/1"
    assert proxy.requests[-1] not in kept["requests"]  # the record is remembered before
    assert (await stored(rest, first))["workspace"] == 1


@pytest.mark.parametrize(
    ("status", "body", "error", "code"),
    [
        ("500 Internal Server Error", {"message": "database is locked"}, UnknownOutcome, "unknown_outcome"),
        ("503 Service Unavailable", "<h1>No</h1>", UnknownOutcome, "unknown_outcome"),
        ("403 Forbidden", {"message": "The user doesn't have enough rights."}, Permanent, "not_permitted"),
        ("403 Forbidden", {"detail": "Invalid token."}, Misconfigured, "misconfigured"),
    ],
)
async def test_a_workspace_that_could_not_be_given_is_unfinished_work(
    status: str,
    body: object,
    error: type[DestinationError],
    code: str,
    *,
    between: tuple[Between, str],
    rest: httpx.AsyncClient,
    make: MakeDestination,
    context_of: MakeContext,
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    first = await upload(rest, context.xml_file_path.stem, context.xml_file_path.read_text(), workspace=None)
    context.remembered["record_id"] = first
    proxy.answer(f"PATCH /rest/data/{first}/assign/1", status, body)
    with pytest.raises(error) as caught:
        await destination.export(context)
    assert caught.value.code == code
    assert await destination.verify(context) == Partial(first)
    assert (await destination.export(context)).record_id == first
    assert (await stored(rest, first))["workspace"] == 1
    assert len(await titled(rest, context.xml_file_path.stem)) == 1


async def test_a_workspace_that_was_replaced_is_looked_up_once_more(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    first = await upload(rest, context.xml_file_path.stem, context.xml_file_path.read_text(), workspace=None)
    context.remembered["record_id"] = first
    proxy.answer(f"GET {WORKSPACES}", "200 OK", [{"id": 99999, "is_public": True}])
    await destination.export(context)
    assert (await stored(rest, first))["workspace"] == 1


async def test_a_record_that_a_person_took_out_of_the_workspace_stays_out(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of()
    result = await make(assign_to_public_workspace=False).export(context)  # as if it had been taken out
    destination, newer = make(), rebuilt(context, result)
    assert (await destination.export(newer)).action == "updated"
    assert await destination.verify(newer) == Present(result.record_id or "", result.record_url)
    assert (await stored(rest, result.record_id))["workspace"] is None
