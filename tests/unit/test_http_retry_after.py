"""What an answer's Retry-After means, and what may stand in messages."""

from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
from pydantic import BaseModel, ValidationError

from consumer.config import Environment, Value
from consumer.destinations.http import BaseUrl, TlsSettings, one_line, retry_after_seconds
from consumer.errors import Misconfigured

NOW = datetime(2026, 11, 24, 12, 0, 0, tzinfo=UTC)


class Address(BaseModel):
    """A model with one address."""

    url: BaseUrl


@pytest.mark.parametrize(("text", "seconds"), [("0", 0), ("120", 120), (" 7 ", 7), ("1.5", 1.5)])
def test_seconds_are_taken_as_they_are(text: str, seconds: float) -> None:
    assert retry_after_seconds(httpx.Headers({"retry-after": text}), NOW) == seconds


def test_a_date_counts_from_the_answers_own_date() -> None:
    headers = {"Retry-After": "Wed, 21 Oct 2015 07:28:30 GMT", "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert retry_after_seconds(headers, NOW) == 30


def test_a_date_counts_from_now_when_the_answer_has_none() -> None:
    assert retry_after_seconds({"Retry-After": "Tue, 24 Nov 2026 12:01:00 GMT"}, NOW) == 60
    assert retry_after_seconds({"Retry-After": "Tue, 24 Nov 2026 12:01:00 GMT", "Date": "today"}, NOW) == 60


def test_a_date_in_the_past_is_no_wait() -> None:
    assert retry_after_seconds({"Retry-After": "Tue, 24 Nov 2026 11:00:00 GMT"}, NOW) == 0


def test_a_date_without_a_zone_is_utc() -> None:
    assert retry_after_seconds({"Retry-After": "Tue, 24 Nov 2026 12:01:00 -0000"}, NOW) == 60


@pytest.mark.parametrize(
    "text",
    ["", "soon", "-5", "1e9", "inf", "NaN", "٣", "5 s", "99999999999999999999", "Tue, 99 Nov 2026 12:00:00 GMT",
     "Tue, 24 Nov 99999 12:00:00 GMT"],
)  # fmt: skip
def test_nonsense_is_ignored(text: str) -> None:
    assert retry_after_seconds({"Retry-After": text}, NOW) is None


def test_no_header_is_no_wish() -> None:
    assert retry_after_seconds({}) is None


def test_a_quoted_text_is_one_printable_short_line() -> None:
    assert one_line("a\r\n\x1b[31m b\t\u2028c\x00") == "a [31m b c"
    assert len(one_line("x" * 10_000)) == 300
    assert one_line("x" * 301).endswith("…")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("https://cdcs.example.org", "https://cdcs.example.org/"),
        (" http://host:8000/base/ ", "http://host:8000/base/"),
        ("", ""),
    ],
)
def test_a_base_address_ends_with_a_slash(given: str, kept: str) -> None:
    assert Address(url=given).url == kept


@pytest.mark.parametrize(
    "wrong", ["cdcs.example.org", "ftp://x/", "https://", "https://u:p@host/", "https://host/?a=b", "https://host/#a"]
)
def test_a_wrong_base_address_is_refused(wrong: str) -> None:
    with pytest.raises(ValidationError, match="must be an address"):
        Address(url=wrong)


def test_tls_settings_have_the_same_names_for_every_destination() -> None:
    values = {"NX_CERT_BUNDLE_FILE": Value("/x.pem", "test"), "NX_DISABLE_SSL_VERIFY": Value("true", "test")}
    settings = Environment(values).read(TlsSettings, "NX_ANY_")
    assert settings == TlsSettings(cert_bundle_file=Path("/x.pem"), disable_ssl_verify=True)


def test_a_bundle_that_is_none_names_its_setting(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match=r"^NX_CERT_BUNDLE holds no certificates"):
        TlsSettings(cert_bundle="nothing").context()
    file = tmp_path / "bundle.pem"
    with pytest.raises(Misconfigured, match=r"^NX_CERT_BUNDLE_FILE cannot be read: No such file"):
        TlsSettings(cert_bundle_file=file).context()
    file.write_text("nothing", encoding="ascii")
    with pytest.raises(Misconfigured, match=r"^NX_CERT_BUNDLE_FILE holds no certificates"):
        TlsSettings(cert_bundle_file=file).context()
