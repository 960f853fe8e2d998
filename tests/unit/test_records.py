"""The generated records are the same for the same seed, all different, and as large as asked for."""

import math
from datetime import datetime
from pathlib import Path

import pytest
from lxml import etree

from tools.records import Record, main, make_record, write_records

NX = "{https://data.nist.gov/od/dm/nexus/experiment/v1.0}"


def tree_of(record: Record) -> etree._Element:
    return etree.fromstring(record.content)


def is_finite(value: str) -> bool:
    """Say whether a value is text or a finite number; CDCS refuses a record with any other one."""
    try:
        return math.isfinite(float(value))
    except ValueError:
        return True


def test_the_same_seed_gives_the_same_record() -> None:
    assert make_record(7, seed=3) == make_record(7, seed=3)


def test_another_seed_gives_another_record() -> None:
    assert make_record(7, seed=3).content != make_record(7, seed=4).content


def test_another_size_is_the_same_session_built_again() -> None:
    small, large = make_record(7, size=2_000), make_record(7, size=20_000)
    assert (small.name, small.session, small.dt_from) == (large.name, large.session, large.dt_from)
    assert small.content != large.content


def test_names_sessions_and_contents_are_unique() -> None:
    records = [make_record(index, size=1_000) for index in range(500)]
    assert len({record.name for record in records}) == 500
    assert len({record.session for record in records}) == 500
    assert len({record.content for record in records}) == 500


@pytest.mark.parametrize("size", [2_000, 3_999, 4_000, 5_000, 54_000, 300_000, 1_000_000])
def test_the_content_is_as_large_as_asked_for(size: int) -> None:
    for index in range(10):
        assert len(make_record(index, size=size).content) == pytest.approx(size, rel=0.1)


def test_the_smallest_record_is_as_small_as_a_whole_record_can_be() -> None:
    assert max(len(make_record(index, size=1_000).content) for index in range(200)) <= 1_400


def test_less_than_the_smallest_size_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1000 bytes"):
        make_record(0, size=999)


@pytest.mark.parametrize("size", [1_000, 54_000])
def test_the_content_says_the_same_as_the_record(size: int) -> None:
    for index in range(20):
        record = make_record(index, size=size)
        tree = tree_of(record)
        assert tree.findtext(f"{NX}id") == record.session
        assert tree.findtext(f"{NX}summary/{NX}experimenter") == record.user
        for tag, moment in (("reservationStart", record.dt_from), ("reservationEnd", record.dt_to)):
            assert datetime.fromisoformat(tree.findtext(f"{NX}summary/{NX}{tag}") or "") == moment
        instrument = tree.find(f"{NX}summary/{NX}instrument")
        assert instrument is not None
        assert instrument.get("pid") == record.instrument_pid


def test_moments_have_a_zone_and_come_in_order() -> None:
    for index in range(50):
        record = make_record(index, size=20_000)
        starts = [datetime.fromisoformat(e.text or "") for e in tree_of(record).iter(f"{NX}startTime")]
        moments = [record.dt_from, *starts, record.dt_to]
        assert None not in {moment.tzinfo for moment in moments}
        assert moments == sorted(moments)


@pytest.mark.parametrize("size", [1_000, 2_000, 54_000])
def test_units_and_names_are_not_all_ascii(size: int) -> None:
    for index in range(20):
        text = make_record(index, size=size).content.decode()
        assert "µm" in text
        assert "Å" in text


def test_no_value_reads_as_an_infinite_number() -> None:
    for index in range(20):
        for element in tree_of(make_record(index)).iter():
            assert is_finite(element.text or "")
            assert all(is_finite(str(value)) for value in element.attrib.values())


def test_records_are_written_with_sizes_between_the_bounds(tmp_path: Path) -> None:
    records = write_records(tmp_path / "new", 40, sizes=(5_000, 20_000))
    sizes = sorted(len(record.content) for record in records)
    assert sizes[0] < 7_000
    assert sizes[-1] > 18_000
    assert {path.name: path.read_bytes() for path in (tmp_path / "new").iterdir()} == {
        record.name: record.content for record in records
    }


def test_the_command_line_writes_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path), "--count", "3", "--min-size", "1000", "--max-size", "2000", "--seed", "9"])
    expected = {make_record(index, seed=9, size=1_000).name for index in range(3)}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert capsys.readouterr().out.startswith("3 records, ")


def test_the_command_line_refuses_sizes_in_the_wrong_order(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path), "--min-size", "3000", "--max-size", "2000"])
