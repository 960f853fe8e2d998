"""What is kept of CDCS for a while, and the names of users in a file."""

import asyncio
from pathlib import Path

import pytest

from consumer.destinations.cdcs_lookups import KEEP_SECONDS, Kept
from consumer.destinations.cdcs_owners import read_names
from consumer.errors import Misconfigured


class Source:
    """A clock, and a value that counts how often it was looked up."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looked_up = 0

    async def look_up(self) -> int:
        """Return how often it was called."""
        self.looked_up += 1
        await asyncio.sleep(0)
        return self.looked_up

    def clock(self) -> float:
        """Return the time in seconds."""
        return self.now


async def test_a_value_is_looked_up_anew_after_ten_minutes() -> None:
    source = Source()
    kept = Kept(source.look_up, source.clock)
    assert KEEP_SECONDS == 600
    assert [await kept.get(), await kept.get()] == [1, 1]
    source.now = 599.9
    assert await kept.get() == 1
    source.now = 600
    assert await kept.get() == 2
    source.now = 1100
    assert await kept.get() == 2


async def test_a_value_is_looked_up_anew_when_asked_for() -> None:
    source = Source()
    kept = Kept(source.look_up, source.clock)
    await kept.get()
    assert await kept.renew() == 2
    assert await kept.get() == 2
    kept.forget()
    assert await kept.get() == 3


async def test_one_look_up_serves_all_that_wait() -> None:
    source = Source()
    kept = Kept(source.look_up, source.clock)
    assert await asyncio.gather(*(kept.get() for _ in range(5))) == [1] * 5


@pytest.mark.parametrize(
    "text",
    [
        "ada,alovelace\nbob , Robert Brown\n",
        '\ufeff# NexusLIMS, CDCS\r\n\r\nada,"alovelace"\r\nbob, "Robert Brown"\r\n',
        '{"ada": "alovelace", "bob": " Robert Brown"}',
    ],
)
def test_names_are_read_from_csv_and_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text(text, encoding="utf-8", newline="")
    assert read_names(path) == {"ada": "alovelace", "bob": "Robert Brown"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ada,alovelace\nbob\n", "line 2: needs a user name of NexusLIMS, a comma, and one of CDCS"),
        (b"ada,a,b\n", "line 1"),
        (b"ada,\n", "line 1"),
        (b'{"ada": ', "is no JSON: "),
        (b'{"ada": 5}', "gives 'ada' no user name at CDCS but 5"),
        (b"ada,\xff", "holds no UTF-8 text"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_of_names_that_cannot_be_used_is_told(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "users.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Misconfigured, match=f"NX_CDCS_USERS_FILE: .*users.csv.*{message}"):
        read_names(path)
