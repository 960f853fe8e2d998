"""Exports to a real CDCS: what it stores, what becomes of newer builds, and what is found again."""

import asyncio
import hashlib
import uuid

import httpx
import pytest

from consumer.destinations.cdcs_rules import record_title
from consumer.destinations.contract import Absent, LastExport, Partial, Present, Unsure
from consumer.errors import Permanent
from tests.integration import cdcs_kit
from tests.integration.cdcs_kit import (
    TEMPLATES,
    Between,
    MakeContext,
    MakeDestination,
    rebuilt,
    stored,
    titled,
    upload,
)
from tools.records import make_record
from tools.servers.cdcs import CdcsServer

between, context_of, make, rest = cdcs_kit.between, cdcs_kit.context_of, cdcs_kit.make, cdcs_kit.rest


async def test_a_record_arrives_byte_for_byte(
    cdcs: CdcsServer, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    content = b"\xef\xbb\xbf" + make_record(1, size=54_000).content.replace(b"\n", b"\r\n") + "<!-- 𝄞 -->".encode()
    context = context_of(content=content)
    result = await make().export(context)
    assert result.success
    assert result.action == "created"
    assert result.record_url == f"{cdcs.url}data?id={result.record_id}"
    assert (await rest.get(result.record_url)).status_code == 200
    record = await stored(rest, result.record_id)
    assert record["xml_content"].encode() == content
    assert record["title"] == context.xml_file_path.stem
    assert record["workspace"] == 1
    named = (await rest.get(TEMPLATES[1:], params={"title": "Nexus Experiment Schema"})).json()
    assert str(record["template"]) == named[0]["current"]


async def test_a_large_record_arrives_byte_for_byte(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    content = make_record(1, size=3_000_000).content
    result = await make().export(context_of(content=content))
    assert (await stored(rest, result.record_id))["xml_content"].encode() == content


async def test_the_address_may_end_without_a_slash(
    cdcs: CdcsServer, make: MakeDestination, context_of: MakeContext
) -> None:
    result = await make(url=cdcs.url.rstrip("/")).export(context_of())
    assert result.record_url == f"{cdcs.url}data?id={result.record_id}"


async def test_one_request_a_record_once_things_are_known(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination = make(url=url)
    await destination.export(context_of())
    kinds = [request.rpartition("/rest/")[2].partition("/")[0] for request in proxy.requests]
    assert kinds == ["template-version-manager", "template", "workspace", "data"]
    del proxy.requests[:]
    await asyncio.gather(*(destination.export(context_of(index)) for index in range(5)))
    assert proxy.requests == ["POST /rest/data/"] * 5


async def test_first_exports_together_look_things_up_once(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination = make(url=url)
    await asyncio.gather(*(destination.export(context_of(index)) for index in range(5)))
    assert proxy.requests.count("POST /rest/data/") == 5
    assert len(proxy.requests) == len({*proxy.requests, "POST /rest/data/"}) + 4


async def test_a_newer_build_updates_the_same_record(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, first = make(), context_of()
    result = await destination.export(first)
    newer = rebuilt(first, result)
    assert await destination.verify(newer) == Partial(result.record_id or "")
    again = await destination.export(newer)
    assert (again.action, again.record_id, again.record_url) == ("updated", result.record_id, result.record_url)
    assert (await stored(rest, result.record_id))["xml_content"].encode() == newer.xml_file_path.read_bytes()
    assert (await stored(rest, result.record_id))["workspace"] == 1
    assert await destination.verify(newer) == Present(result.record_id or "", result.record_url)
    assert len(await titled(rest, newer.xml_file_path.stem)) == 1


async def test_the_same_bytes_again_are_unchanged(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    result = await destination.export(context)
    del proxy.requests[:]
    again = await destination.export(rebuilt(context, result, index=1, record_sha256=context.record_sha256))
    assert again.action == "updated"  # another size
    context.last_export = LastExport(result.record_id or "", None, None, None)
    unchanged = await destination.export(context)
    assert (unchanged.action, unchanged.record_id) == ("unchanged", result.record_id)
    assert [request.partition(" ")[0] for request in proxy.requests] == ["GET", "PATCH", "GET"]


async def test_the_last_build_stays_also_when_it_is_as_an_earlier_one(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, first = make(), context_of(1)
    content = first.xml_file_path.read_bytes()
    result = await destination.export(first)
    second = rebuilt(first, result, index=2)
    assert (await destination.export(second)).action == "updated"
    third = rebuilt(second, result, index=2)
    third.xml_file_path.write_bytes(content)
    third.record_sha256 = first.record_sha256
    assert await destination.verify(third) == Partial(result.record_id or "")
    assert (await destination.export(third)).action == "updated"
    assert (await stored(rest, result.record_id))["xml_content"].encode() == content
    assert await destination.verify(third) == Present(result.record_id or "", result.record_url)
    assert len(await titled(rest, first.xml_file_path.stem)) == 1


async def test_what_a_person_changed_is_not_written_over(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(), context_of()
    result = await destination.export(context)
    by_hand = make_record(3, size=1_500).content.decode()
    assert (await rest.patch(f"rest/data/{result.record_id}/", json={"xml_content": by_hand})).status_code == 200
    newer = rebuilt(context, result)
    assert await destination.verify(newer) == Partial(result.record_id or "")
    with pytest.raises(
        Permanent, match=rf"data\?id={result.record_id}\); `nexus-export replay --overwrite`"
    ) as caught:
        await destination.export(newer)
    assert caught.value.code == "changed_at_destination"
    assert (await stored(rest, result.record_id))["xml_content"] == by_hand


async def test_what_a_person_deleted_is_not_made_again(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(), context_of()
    result = await destination.export(context)
    assert (await rest.delete(f"rest/data/{result.record_id}/")).status_code == 204
    newer = rebuilt(context, result)
    assert await destination.verify(newer) == Absent()
    with pytest.raises(Permanent, match=f"record {result.record_id} was deleted at CDCS") as caught:
        await destination.export(newer)
    assert caught.value.code == "changed_at_destination"
    assert (await titled(rest, context.xml_file_path.stem)) == []


async def test_a_remembered_record_is_gone_on_with(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(), context_of()
    result = await destination.export(context)
    context.remembered["record_id"] = result.record_id
    again = await destination.export(context)
    assert (again.action, again.record_id) == ("created", result.record_id)
    newer = rebuilt(context, result, last_export=None)
    assert (await destination.export(newer)).action == "updated"
    foreign = rebuilt(context, result, index=4, last_export=None, sent_hashes=frozenset())
    with pytest.raises(Permanent, match="was changed at CDCS"):
        await destination.export(foreign)
    assert len(await titled(rest, context.xml_file_path.stem)) == 1


@pytest.mark.parametrize("stem", ["{}" + "x" * 210, "{}cost$", " {} padded ", "{}ü (Å) #1 & 'b'"])
async def test_any_file_name_becomes_a_title_that_is_found_again(
    stem: str, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(), context_of(stem=stem.format(uuid.uuid4().hex))
    result = await destination.export(context)
    title = record_title(context.xml_file_path.stem)
    assert (await stored(rest, result.record_id))["title"] == title


async def test_a_template_that_was_replaced_is_looked_up_once_more(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    outdated = {"id": 1, "title": "Nexus Experiment Schema", "current": "99999", "versions": ["99999"]}
    proxy.answer(f"GET {TEMPLATES}", "200 OK", [outdated])
    proxy.answer("GET /rest/workspace/read_access/", "200 OK", [{"id": 99999, "is_public": True}])
    result = await make(url=url).export(context_of())
    assert (await stored(rest, result.record_id))["workspace"] == 1
    assert proxy.requests.count("POST /rest/data/") == 2


async def test_an_ordinary_user_can_export_and_update(
    cdcs: CdcsServer, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(token=cdcs.plain_token), context_of()
    result = await destination.export(context)
    assert (await stored(rest, result.record_id))["workspace"] == 1
    assert (await destination.export(rebuilt(context, result))).action == "updated"


async def test_another_users_record_is_not_changed_without_the_right(
    cdcs: CdcsServer, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of()
    result = await make(assign_to_public_workspace=False).export(context)
    plain, newer = make(token=cdcs.plain_token), rebuilt(context, result)
    with pytest.raises(Permanent, match="may not read this record") as caught:
        await plain.export(newer)
    assert caught.value.code == "not_permitted"
    assert isinstance(await plain.verify(newer), Unsure)
    assert (await stored(rest, result.record_id))["xml_content"].encode() != newer.xml_file_path.read_bytes()


async def test_a_record_that_nobody_sent_is_absent(make: MakeDestination, context_of: MakeContext) -> None:
    assert await make().verify(context_of()) == Absent()


async def test_an_earlier_build_of_ours_is_a_part(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of()
    content = make_record(5, size=2_000).content
    earlier = await upload(rest, context.xml_file_path.stem, content.decode())
    context.sent_hashes |= {hashlib.sha256(content).hexdigest()}
    assert await make().verify(context) == Partial(earlier)


async def test_a_record_of_somebody_else_with_the_title_is_a_conflict(
    cdcs: CdcsServer, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of()
    foreign = await upload(rest, context.xml_file_path.stem, make_record(6, size=2_000).content.decode())
    with pytest.raises(Permanent, match=rf"{cdcs.url}data\?id={foreign} has the title") as caught:
        await make().verify(context)
    assert caught.value.code == "conflict"


async def test_of_two_equal_copies_the_first_counts_and_the_other_is_reported(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of()
    content = context.xml_file_path.read_text()
    first, second = [await upload(rest, context.xml_file_path.stem, content) for _ in range(2)]
    assert await make().verify(context) == Present(first, f"{rest.base_url}data?id={first}", (second,))


async def test_the_last_look_up_keeps_the_copy_that_the_outcome_names(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of(purpose="recheck")
    content = context.xml_file_path.read_text()
    late, named = [await upload(rest, context.xml_file_path.stem, content) for _ in range(2)]
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    context.last_export = LastExport(named, None, sha256, sha256)
    assert await make().verify(context) == Present(named, f"{rest.base_url}data?id={named}", (late,))


async def test_a_public_record_of_another_user_is_read_and_not_changed_without_the_right(
    cdcs: CdcsServer, rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of()
    result = await make().export(context)
    plain, newer = make(token=cdcs.plain_token), rebuilt(context, result)
    assert await plain.verify(newer) == Partial(result.record_id or "")
    with pytest.raises(Permanent, match="NX_CDCS_TOKEN may not change this record") as caught:
        await plain.export(newer)
    assert caught.value.code == "not_permitted"
    assert (await stored(rest, result.record_id))["xml_content"].encode() != newer.xml_file_path.read_bytes()


async def test_a_title_that_a_person_changed_stays(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(), context_of()
    result = await destination.export(context)
    title = f"A better title {uuid.uuid4().hex}"
    assert (await rest.patch(f"rest/data/{result.record_id}/", json={"title": title})).status_code == 200
    newer = rebuilt(context, result)
    assert (await destination.export(newer)).action == "updated"
    record = await stored(rest, result.record_id)
    assert (record["title"], record["xml_content"].encode()) == (title, newer.xml_file_path.read_bytes())
    found = Present(result.record_id or "", result.record_url)
    assert await destination.verify(newer) == found
    newer.purpose = "recheck"
    assert await destination.verify(newer) == found


async def test_the_last_look_up_tells_a_copy_that_was_changed_or_deleted(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(), context_of()
    result = await destination.export(context)
    context.last_export = LastExport(result.record_id or "", None, context.record_sha256, context.record_sha256)
    context.purpose = "recheck"
    assert await destination.verify(context) == Present(result.record_id or "", result.record_url)
    by_hand = make_record(3, size=1_500).content.decode()
    assert (await rest.patch(f"rest/data/{result.record_id}/", json={"xml_content": by_hand})).status_code == 200
    assert await destination.verify(context) == Partial(result.record_id or "")
    assert (await rest.delete(f"rest/data/{result.record_id}/")).status_code == 204
    assert await destination.verify(context) == Absent()


async def test_a_hit_with_another_title_is_none(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    context = context_of()
    other = await upload(rest, uuid.uuid4().hex, context.xml_file_path.read_text())
    proxy.answer("POST /rest/data/query/", "200 OK", [await stored(rest, other)])  # as if it ignored the filter
    assert await make(url=url).verify(context) == Absent()
