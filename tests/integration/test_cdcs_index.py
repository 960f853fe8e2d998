"""The full-text index that CDCS keeps in PostgreSQL: what is refused for it here, a real PostgreSQL refuses."""

import json
import random
from collections.abc import AsyncIterator

import asyncpg
import httpx
import pytest

from consumer.destinations.cdcs_content import INDEX_BYTES, word_bytes
from consumer.errors import Permanent
from tests.integration import cdcs_kit
from tests.integration.cdcs_kit import Between, MakeContext, MakeDestination, stored
from tools.records import make_record
from tools.servers.postgresql import PostgresServer

between, context_of, make, rest = cdcs_kit.between, cdcs_kit.context_of, cdcs_kit.make, cdcs_kit.rest

INDEXED = "SELECT coalesce(sum(octet_length(lexeme)), 0) FROM unnest(to_tsvector('english', $1::jsonb))"


@pytest.fixture
async def connection(postgres: PostgresServer) -> AsyncIterator[asyncpg.Connection]:
    """Give a connection to a real PostgreSQL, the database that CDCS is made for."""
    connection = await asyncpg.connect(postgres.url(driver="postgresql"))
    yield connection
    await connection.close()


def experiment(words: list[str]) -> bytes:
    text = make_record(1, size=2_000).content.decode()
    head, tail = text.split("<id>", 1)
    return f"{head}<id>{' '.join(words)} {tail}".encode()


async def test_more_words_than_postgresql_indexes_are_not_sent(
    connection: asyncpg.Connection, between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    words = [f"{number:08x}z9" for number in range(INDEX_BYTES // 10 + 1)]
    content = experiment(words)
    with pytest.raises(Permanent, match="of different words; CDCS indexes at most 1048575") as caught:
        await make(url=url).export(context_of(content=content))
    assert caught.value.code == "rejected"
    assert proxy.requests == []
    with pytest.raises(asyncpg.ProgramLimitExceededError, match="string is too long for tsvector"):
        await connection.fetchval(INDEXED, json.dumps({"id": " ".join(words)}))


async def test_a_large_record_of_the_same_words_is_sent(
    rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    content = experiment([f"{number % 50_000:08x}z9" for number in range(200_000)])
    assert len(content) > 2 * INDEX_BYTES
    result = await make().export(context_of(content=content))
    assert (await stored(rest, result.record_id))["xml_content"].encode() == content


PIECES = [
    "word", "running", "12", "-7", "1.5e-3", "a1b2", "FILE_0001.dm4", "/data/Titan/2026/scan_17.tif", "x@y2.org",
    "http://h1.example.org/a2/b?c=d3", "www.h2.org/p4", "v1.2.3", "10:30:00", "2026-11-24T10:00:00Z", "<tag a5='6'>",
    "&e7;", "a-b8-c9", "50%", "µ12", "é9x", "1_000", "#8", "(k3)", "0x1F", "3d", "1e5zrunning", "q'r4", "9" * 30,
    "\\x41", "a1/b2/c3", "..7", "5-6", "--4", "+3", "$2", "a=1&b=2", "~user1/x", "C:\\dir1\\f2", "x" * 2100 + "1",
]  # fmt: skip


async def test_never_more_is_counted_than_postgresql_indexes(connection: asyncpg.Connection) -> None:
    draw = random.Random(20261124)  # noqa: S311 - test data
    for _ in range(400):
        pieces = draw.choices(PIECES, k=draw.randrange(1, 8))
        text = "".join(piece + draw.choice([" ", "", "-", ".", "/", "_", ":", "\n", ","]) for piece in pieces)
        indexed = await connection.fetchval(INDEXED, json.dumps({"a": text}))
        assert word_bytes(iter([text])) <= indexed, text
    ending = "1e5running"  # PostgreSQL keeps 1e5 and run
    assert word_bytes(iter([ending])) < await connection.fetchval(INDEXED, json.dumps({"a": ending})) < len(ending)
    plain = "scan17 a1b2 x0001 tile9 17 042"
    assert word_bytes(iter([plain])) == await connection.fetchval(INDEXED, json.dumps({"a": plain}))
