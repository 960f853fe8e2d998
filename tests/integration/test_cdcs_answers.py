"""What the answers of a real CDCS mean: settings and rights, lost answers, a server in trouble."""

import re
import ssl
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from consumer.destinations.cdcs import Cdcs
from consumer.destinations.contract import Present, Unsure
from consumer.errors import Misconfigured, Permanent, Transient, UnknownOutcome
from tests.integration import cdcs_kit
from tests.integration.cdcs_kit import (
    NEXUS,
    TEMPLATES,
    WORKSPACES,
    Between,
    MakeContext,
    MakeDestination,
    rebuilt,
    titled,
    upload,
)
from tools.servers.cdcs import CdcsServer
from tools.servers.ports import free_port

between, context_of, make, rest = cdcs_kit.between, cdcs_kit.context_of, cdcs_kit.make, cdcs_kit.rest


async def test_a_wrong_token_waits_for_a_person(make: MakeDestination, context_of: MakeContext) -> None:
    destination, context = make(token="c" * 40), context_of()
    with pytest.raises(Misconfigured, match=r"^Could not authenticate to CDCS.*NX_CDCS_TOKEN.*Invalid token"):
        await destination.export(context)
    with pytest.raises(Misconfigured, match="NX_CDCS_TOKEN"):
        await destination.verify(context)
    valid, message = await destination.validate_config()
    assert not valid
    assert (message or "").startswith("CDCS authentication failed: ")
    assert "cccc" not in (message or "")


async def test_a_token_that_is_withdrawn_later_waits_for_a_person(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    result = await destination.export(context)
    refusal = {"detail": "Invalid token."}
    proxy.answer("POST /rest/data/", "403 Forbidden", refusal)
    proxy.answer("POST /rest/data/", "401 Unauthorized", refusal)
    proxy.answer(f"GET /rest/data/{result.record_id}/", "403 Forbidden", refusal)
    for new in (context_of(), context_of(), rebuilt(context, result)):
        with pytest.raises(Misconfigured, match="Could not authenticate to CDCS"):
            await destination.export(new)


CREDENTIALS = [("401 Unauthorized", {"detail": "Invalid token."}), ("403 Forbidden", {"detail": "Invalid token."})]


@pytest.mark.parametrize(("status", "body"), CREDENTIALS)
async def test_a_refused_token_is_understood_in_every_request(
    status: str,
    body: object,
    *,
    between: tuple[Between, str],
    rest: httpx.AsyncClient,
    make: MakeDestination,
    context_of: MakeContext,
) -> None:
    proxy, url = between
    schema = (await rest.get(TEMPLATES[1:], params={"title": NEXUS})).json()[0]["current"]
    context = context_of()
    result = await make(url=url).export(context)
    newer, path = rebuilt(context, result), f"/rest/data/{result.record_id}/"
    private = context_of()
    private_id = await upload(rest, private.xml_file_path.stem, private.xml_file_path.read_text(), workspace=None)
    private.remembered["record_id"] = private_id
    calls: list[tuple[str, Callable[[Cdcs], Any]]] = [
        (f"GET {TEMPLATES}", lambda cdcs: cdcs.export(context_of())),
        (f"GET /rest/template/{schema}/download/", lambda cdcs: cdcs.export(context_of())),
        (f"GET {WORKSPACES}", lambda cdcs: cdcs.export(context_of())),
        ("POST /rest/data/", lambda cdcs: cdcs.export(context_of())),
        (f"GET {path}", lambda cdcs: cdcs.export(newer)),
        (f"PATCH {path}", lambda cdcs: cdcs.export(newer)),
        (f"PATCH /rest/data/{private_id}/assign/1", lambda cdcs: cdcs.export(private)),
        (f"GET {TEMPLATES}", lambda cdcs: cdcs.verify(newer)),
        (f"GET {path}", lambda cdcs: cdcs.verify(newer)),
        ("POST /rest/data/query/", lambda cdcs: cdcs.verify(context_of())),
    ]
    for request, call in calls:
        proxy.answer(request, status, body)
        with pytest.raises(Misconfigured, match="Could not authenticate to CDCS, check NX_CDCS_TOKEN"):
            await call(make(url=url))
        assert not proxy.canned[request], request


@pytest.mark.parametrize("status", ["403 Forbidden", "500 Internal Server Error"])
async def test_a_missing_right_to_one_record_fails_that_record(
    status: str,
    *,
    between: tuple[Between, str],
    rest: httpx.AsyncClient,
    make: MakeDestination,
    context_of: MakeContext,
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    result = await destination.export(context)
    newer, path = rebuilt(context, result), f"/rest/data/{result.record_id}/"
    private = context_of()
    private_id = await upload(rest, private.xml_file_path.stem, private.xml_file_path.read_text(), workspace=None)
    private.remembered["record_id"] = private_id
    calls = [
        (f"GET {path}", newer, "read"),
        (f"PATCH {path}", newer, "change"),
        (f"PATCH /rest/data/{private_id}/assign/1", private, "change"),
    ]
    for request, about, verb in calls:
        proxy.answer(request, status, {"message": "The user doesn't have enough rights to access this document."})
        with pytest.raises(Permanent, match=f"NX_CDCS_TOKEN may not {verb} this record: .*enough rights") as caught:
            await destination.export(about)
        assert caught.value.code == "not_permitted"
    proxy.answer(f"GET {path}", status, {"message": "The user doesn't have enough rights to access this document."})
    assert isinstance(await destination.verify(newer), Unsure)


async def test_a_missing_template_waits_for_a_person(make: MakeDestination, context_of: MakeContext) -> None:
    destination = make(template_title="Nothing")
    expected = (
        r"'Nothing' in use; there are: 'Another Schema', 'Nexus Experiment Schema'\. Set NX_CDCS_TEMPLATE_TITLE"
    )
    with pytest.raises(Misconfigured, match=expected):
        await destination.export(context_of())
    valid, message = await destination.validate_config()
    assert not valid
    assert "CDCS configuration error: CDCS has no schema titled 'Nothing'" in (message or "")


async def test_a_working_configuration_is_valid(make: MakeDestination) -> None:
    assert await make().validate_config() == (True, None)
    with capture_logs() as logs:
        assert await make(user_owned_records=True).validate_config() == (True, None)
    assert [entry["event"] for entry in logs] == ["superuser_token_needed"]


async def test_a_token_without_rights_for_the_settings_is_told(cdcs: CdcsServer, make: MakeDestination) -> None:
    destination = make(token=cdcs.plain_token)
    assert await destination.validate_config() == (True, None)
    valid, message = await make(token=cdcs.plain_token, user_owned_records=True).validate_config()
    assert not valid
    assert re.search(
        "NX_CDCS_USER_OWNED_RECORDS needs the token of a superuser, and NX_CDCS_TOKEN is none .*"
        "give another token, or set NX_CDCS_USER_OWNED_RECORDS=false",
        message or "",
    )


async def test_a_file_of_users_that_cannot_be_used_is_told(make: MakeDestination, tmp_path: Path) -> None:
    path = tmp_path / "users.csv"
    path.write_text("ada,alovelace\nbob\n")
    valid, message = await make(user_owned_records=True, users_file=path).validate_config()
    assert not valid
    assert (message or "").startswith(f"CDCS configuration error: NX_CDCS_USERS_FILE: {path}, line 2: needs a user ")


async def test_an_address_without_tls_is_told(cdcs: CdcsServer, make: MakeDestination) -> None:
    valid, message = await make(url=cdcs.url.replace("http:", "https:")).validate_config()
    assert not valid
    assert re.search(r"cannot connect to 127.*is NX_CDCS_URL \(https://.*\) right", message or "")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Give a certificate that nobody trusts yet, and its key."""
    folder = tmp_path_factory.mktemp("certificate")
    paths = folder / "cert.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=cdcs"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "keyUsage=critical,digitalSignature,keyCertSign"]
    command += ["-out", str(paths[0]), "-keyout", str(paths[1])]
    subprocess.run(command, check=True, capture_output=True)
    return paths


async def test_a_certificate_that_is_not_trusted_is_told(
    cdcs: CdcsServer, certificate: tuple[Path, Path], make: MakeDestination, context_of: MakeContext
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    async with Between(cdcs.port).running(tls) as url:
        valid, message = await make(url=url).validate_config()
        assert not valid
        assert re.search("certificate of 127.* is not trusted .*; add the CA .* NX_CERT_BUNDLE_FILE", message or "")
        trusting = make(url=url, cert_bundle_file=certificate[0])
        assert await trusting.validate_config() == (True, None)
        assert (await trusting.export(context_of())).success


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        ("503 Service Unavailable", "<h1>No</h1>", r"^CDCS answered 503 Service Unavailable at http.*global/$"),
        ("200 OK", "<h1>Please log in</h1>", r"with no JSON.*is NX_CDCS_URL .* right"),
        ("200 OK", {"count": 0}, r"answered something unexpected.*is NX_CDCS_URL .* right"),
    ],
)
async def test_an_answer_that_is_no_list_of_schemas_is_told(
    status: str, body: object, expected: str, *, between: tuple[Between, str], make: MakeDestination
) -> None:
    proxy, url = between
    for _ in range(2):
        proxy.answer(f"GET {TEMPLATES}", status, body)
    valid, message = await make(url=url).validate_config()
    assert not valid
    assert re.search(expected, message or "")


async def test_an_address_that_is_no_cdcs_is_told(
    cdcs: CdcsServer, make: MakeDestination, context_of: MakeContext
) -> None:
    destination = make(url=cdcs.url + "elsewhere")
    valid, message = await destination.validate_config()
    assert not valid
    assert message == f"CDCS answered 404 Not Found at {cdcs.url}elsewhere{TEMPLATES}; check NX_CDCS_URL"
    with pytest.raises(Misconfigured, match="NX_CDCS_URL"):
        await destination.export(context_of())


async def test_a_server_that_is_down_is_asked_again_later(make: MakeDestination, context_of: MakeContext) -> None:
    destination = make(url=f"http://127.0.0.1:{free_port()}/")
    for call in (destination.export, destination.verify):
        with pytest.raises(Transient, match="cannot connect to 127"):
            await call(context_of())
    valid, message = await destination.validate_config()
    assert not valid
    assert (message or "").startswith("CDCS configuration error: cannot connect to ")
    assert re.search(r"is NX_CDCS_URL \(http.*\) right, and does CDCS run\?$", message or "")


async def test_a_record_file_that_is_gone_is_told(make: MakeDestination, context_of: MakeContext) -> None:
    context = context_of()
    context.xml_file_path.unlink()
    with pytest.raises(Transient, match=r"cannot be read: No such file"):
        await make().export(context)


async def test_an_answer_lost_after_the_commit_is_found_again(
    between: tuple[Between, str], rest: httpx.AsyncClient, make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    proxy.reset_after.add("POST /rest/data/")
    with pytest.raises(UnknownOutcome, match=r"POST .*no complete answer"):
        await destination.export(context)
    answer = await destination.verify(context)
    (record,) = await titled(rest, context.xml_file_path.stem)
    assert answer == Present(str(record["id"]), f"{url}data?id={record['id']}")


async def test_an_update_whose_answer_is_lost_is_found_again(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, context = make(url=url), context_of()
    result = await destination.export(context)
    proxy.reset_after.add(f"PATCH /rest/data/{result.record_id}/")
    newer = rebuilt(context, result)
    with pytest.raises(UnknownOutcome):
        await destination.export(newer)
    assert await destination.verify(newer) == Present(result.record_id or "", result.record_url)


BROKEN: list[tuple[str, object, str]] = [
    ("500 Internal Server Error", {"message": "server closed the connection unexpectedly"}, "unexpectedly"),
    ("500 Internal Server Error", "<h1>Server Error (500)</h1>", "Server Error"),
    ("502 Bad Gateway", "<h1>Bad Gateway</h1>", "Bad Gateway"),
    ("200 OK", "<h1>Please log in</h1>", "log in"),
    ("201 Created", "{", "no JSON"),
    ("201 Created", {"title": "x"}, "did not say which"),
]


@pytest.mark.parametrize(("status", "body", "reason"), BROKEN)
async def test_an_answer_that_says_nothing_leaves_the_outcome_unknown(
    between: tuple[Between, str],
    make: MakeDestination,
    context_of: MakeContext,
    *,
    status: str,
    body: object,
    reason: str,
) -> None:
    proxy, url = between
    proxy.answer("POST /rest/data/", status, body, "Retry-After: 9")
    with pytest.raises(UnknownOutcome, match=reason) as caught:
        await make(url=url).export(context_of())
    if status.startswith("5"):
        assert caught.value.retry_after == 9


async def test_a_missing_right_to_create_waits_for_a_person(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    message = {"message": "The user doesn't have enough rights to publish."}
    for status in ("500 Internal Server Error", "403 Forbidden"):
        proxy.answer("POST /rest/data/", status, message)
        with pytest.raises(Misconfigured, match=r"may not create records: .*enough rights"):
            await make(url=url).export(context_of())


@pytest.mark.parametrize(
    ("status", "error"),
    [("413 Content Too Large", Permanent), ("429 Too Many Requests", Transient), ("404 Not Found", Misconfigured)],
)
async def test_other_refusals_of_a_create(
    status: str,
    error: type[Exception],
    between: tuple[Between, str],
    make: MakeDestination,
    context_of: MakeContext,
) -> None:
    proxy, url = between
    proxy.answer("POST /rest/data/", status, "<h1>No</h1>")
    with pytest.raises(error):
        await make(url=url).export(context_of())


async def test_a_look_up_that_fails_answers_nothing(
    between: tuple[Between, str], make: MakeDestination, context_of: MakeContext
) -> None:
    proxy, url = between
    destination, query = make(url=url), "POST /rest/data/query/"
    proxy.answer(query, "400 Bad Request", {"message": "Number of documents is over the limit."})
    assert isinstance(await destination.verify(context_of()), Unsure)
    proxy.answer(query, "500 Internal Server Error", {"message": "database is locked"})
    proxy.answer(query, "200 OK", {"count": 0})
    for _ in range(2):
        with pytest.raises(Transient):
            await destination.verify(context_of())
