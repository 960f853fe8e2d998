"""Generated records are what the schema of NexusLIMS asks for."""

import random
from pathlib import Path

import pytest
from lxml import etree

from tools.records import make_record


@pytest.fixture(scope="module")
def schema(nexus_schema: Path) -> etree.XMLSchema:
    return etree.XMLSchema(etree.parse(nexus_schema))


def check(schema: etree.XMLSchema, content: bytes) -> None:
    """Raise with the line and the reason if the schema refuses the content."""
    schema.assertValid(etree.fromstring(content).getroottree())


@pytest.mark.parametrize("size", [1_000, 2_000, 5_000, 54_000, 300_000, 1_000_000])
def test_a_record_of_any_size_is_valid(schema: etree.XMLSchema, size: int) -> None:
    check(schema, make_record(0, size=size).content)


@pytest.mark.parametrize("seed", range(50))
def test_a_random_record_is_valid(schema: etree.XMLSchema, seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311 - a failing record has to come back in the next run
    record = make_record(rng.randrange(100_000), seed=seed, size=rng.randrange(1_000, 120_000))
    check(schema, record.content)


@pytest.mark.parametrize(
    ("right", "wrong", "reason"),
    [
        pytest.param(b"</reservationStart>", b" noon</reservationStart>", "xs:dateTime", id="a time"),
        pytest.param(b'role="Experimental"', b'role="Guess"', "enumeration", id="an enumerated value"),
        pytest.param(b"<motivation>", b"<user>x</user><motivation>", "not expected", id="a strange element"),
    ],
)
def test_a_broken_record_is_refused(schema: etree.XMLSchema, right: bytes, wrong: bytes, reason: str) -> None:
    content = make_record(0, size=5_000).content
    assert right in content
    with pytest.raises(etree.DocumentInvalid, match=reason):
        check(schema, content.replace(right, wrong))
