"""What CDCS refuses though it may be valid: numbers that JSON does not have, too many words, a DOCTYPE."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumer.destinations.cdcs_content import INDEX_BYTES, is_no_json_number, read_document, word_bytes
from consumer.errors import Permanent


@pytest.mark.parametrize(
    "text", ["NaN", "nan", " inf\n", "-Infinity", "+INF", "1e999", "-1E400", "9" * 5000, "1_0e9_99"]
)
def test_a_number_that_json_does_not_have(text: str) -> None:
    assert is_no_json_number(text)


@pytest.mark.parametrize(
    "text", ["", "1", "1e308", "9" * 400, "NaN nm", "nano", "info", "0x7ff", "infinity war", "∞"]
)
def test_what_looks_a_little_like_one(text: str) -> None:
    assert not is_no_json_number(text)


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"<a>\n<b>NaN</b></a>", "rejected", "line 2: b is 'NaN', a number that CDCS cannot store"),
        (b'<a>\n\n<b x="-inf">1</b></a>', "rejected", "line 3: x of b is '-inf'"),
        (b"<n:a xmlns:n='urn:n'>\n<n:b>1e<!-- -->9<c/>99</n:b></n:a>", "rejected", "line 2: b is '1e999'"),
        (b"<a>\n<b></a>", "record_malformed", "the record is no well-formed XML: .*line 2"),
        (b"", "record_malformed", "no well-formed XML"),
        (b"<!DOCTYPE a><a/>", "record_doctype", r"the record has a DOCTYPE \(<!DOCTYPE a>\)"),
        (b'<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/hostname">]><a>&e;</a>', "record_doctype", "DOCTYPE"),
    ],
)
def test_what_is_refused_is_told_with_line_and_reason(content: bytes, code: str, message: str) -> None:
    with pytest.raises(Permanent, match=message) as caught:
        read_document(content)
    assert caught.value.code == code


def test_a_number_as_a_part_of_a_text_is_no_number() -> None:
    root = read_document(b"<a>NaN<b>in</b> is <c>f</c>not a number</a>").getroot()
    assert root.tag == "a"


def test_more_words_than_the_index_takes_are_refused() -> None:
    words = [f"word{number:07}" for number in range(INDEX_BYTES // 11 + 1)]
    content = f"<a><b>{' '.join(words)}</b></a>".encode()
    with pytest.raises(Permanent, match=rf"bytes of different words; CDCS indexes at most {INDEX_BYTES}") as caught:
        read_document(content)
    assert caught.value.code == "rejected"
    fewer = f"<a><b>{' '.join(words[:-1])}</b><c>{' '.join(words[:50_000])}</c></a>".encode()
    assert len(fewer) > len(content)
    read_document(fewer)


def test_only_words_that_surely_count_are_counted() -> None:
    counted = word_bytes(iter(["word1 word1 WORD1", "plain words only", "12", "1e5"]))
    assert counted == len("word1")
    ignored = ["<a b1='c2'>", "a1&b2;", "ftp://host1/x2", "x1/" + "y" * 2050]
    assert word_bytes(iter(ignored)) == 0


@given(st.text())
def test_a_float_of_python_decides(text: str) -> None:
    try:
        number = float(text)
    except ValueError:
        assert not is_no_json_number(text)
    else:
        assert is_no_json_number(text) == (number != number or number in {float("inf"), float("-inf")})  # noqa: PLR0124
