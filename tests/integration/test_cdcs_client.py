"""What was exported is read back by the client of NIST, which knows nothing of this project."""

import asyncio
import uuid
from typing import Any

import cdcs as nist  # type: ignore[import-untyped]
import pytest

from consumer.errors import Permanent
from tests.integration import cdcs_kit
from tests.integration.cdcs_kit import (
    NEXUS,
    MakeContext,
    MakeDestination,
    rebuilt,
)
from tools.records import make_record
from tools.servers.cdcs import CdcsServer

context_of, make = cdcs_kit.context_of, cdcs_kit.make


@pytest.fixture
def client(cdcs: CdcsServer) -> Any:
    """Give the client of the makers of CDCS, with an administrator's token."""
    return nist.CDCS(cdcs.url.rstrip("/"), username="", token=cdcs.admin_token, cdcsversion="3.0.0")


async def test_the_client_of_nist_reads_what_was_exported(
    client: Any, make: MakeDestination, context_of: MakeContext
) -> None:
    destination, context = make(), context_of(1)
    title = context.xml_file_path.stem
    result = await destination.export(context)
    found = await asyncio.to_thread(client.get_record, template=NEXUS, title=title)
    assert str(found.id) == result.record_id
    assert found.xml_content.encode() == context.xml_file_path.read_bytes()
    assert found.workspace == (await asyncio.to_thread(client.get_workspace, title="Global Public Workspace")).id
    assert found.template == (await asyncio.to_thread(client.get_template, title=NEXUS)).id
    newer = rebuilt(context, result)
    await destination.export(newer)
    found = await asyncio.to_thread(client.get_record, template=NEXUS, title=title)
    assert str(found.id) == result.record_id
    assert found.xml_content.encode() == newer.xml_file_path.read_bytes()


async def test_the_client_of_nist_finds_what_was_exported_by_its_content(
    client: Any, make: MakeDestination, context_of: MakeContext
) -> None:
    name = f"session-{uuid.uuid4().hex}"
    content = make_record(1, size=2_000).content.replace(b"<id>", b"<!-- ", 1).replace(b"</id>", b" -->", 1)
    content = content.replace(b"<summary>", f"<id>{name}</id><summary>".encode(), 1)
    result = await make().export(context_of(content=content))
    found = await asyncio.to_thread(client.query, template=NEXUS, mongoquery={"Experiment.id": name})
    assert [str(number) for number in found.id] == [result.record_id]


async def test_a_record_of_the_client_of_nist_is_not_taken_for_ours(
    client: Any, make: MakeDestination, context_of: MakeContext
) -> None:
    context = context_of()
    content = make_record(9, size=2_000).content.decode()
    title = context.xml_file_path.stem
    await asyncio.to_thread(client.upload_record, template=NEXUS, content=content, title=title)
    with pytest.raises(Permanent, match="bytes that we never sent") as caught:
        await make().verify(context)
    assert caught.value.code == "conflict"
