"""The traps of eLabFTW that its test server has: each is one that an exporter has fallen into, or could."""

import json
from typing import Any

import pytest

from consumer.testing.elabftw_accounts import (
    ACCOUNTS,
    ADMIN_KEY,
    PERSON_KEY,
    READ_ONLY_KEY,
    SERVICE_KEY,
    STRANGER_KEY,
    Settings,
)
from consumer.testing.elabftw_answers import Reply, Request, respond
from consumer.testing.elabftw_faults import Fault, Faults
from consumer.testing.elabftw_html import purified
from consumer.testing.elabftw_search import SearchError, compile_search, like
from consumer.testing.elabftw_store import NO_HASH_BYTES, Notebook

VERSIONS = ("5.3.6", "5.6.12", "6.0.0")
JSON = {"content-type": "application/json"}
METADATA = {"extra_fields": {"Record key": {"type": "text", "value": "0f3A"}}}


class Caller:
    """Sends requests to a notebook, with the service's key unless another is given."""

    def __init__(self, version: str = "6.0.0", **settings: Any) -> None:
        self.notebook = Notebook(Settings(version=version, **settings))

    def __call__(
        self, method: str, path: str, body: Any = None, *, key: str = SERVICE_KEY, headers: Any = JSON, **query: str
    ) -> Reply:
        """Send one request; a value becomes JSON, bytes go as they are."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        asked = {"authorization": key, **headers}
        return respond(self.notebook, Request(method, f"/api/v2/{path}", query, (), asked, content))

    def get(self, path: str, *, key: str = SERVICE_KEY, **query: str) -> Any:
        """Return what is at a path, which must be there."""
        reply = self("GET", path, key=key, **query)
        assert reply.status == 200, reply.body
        return json.loads(reply.body)

    def upload(self, path: str, name: str, content: bytes, **fields: str) -> Reply:
        """Send a file with these fields before it."""
        parts = [f'--xyz\r\nContent-Disposition: form-data; name="{n}"\r\n\r\n{v}\r\n' for n, v in fields.items()]
        head = f'--xyz\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
        body = "".join(parts).encode() + head.encode() + content + b"\r\n--xyz--\r\n"
        return self("POST", path, body, headers={"content-type": "multipart/form-data; boundary=xyz"})


def text_of(reply: Reply) -> tuple[int, str, str]:
    value = json.loads(reply.body)
    return reply.status, value["message"], value["description"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_create_says_nothing_but_another_hosts_address(version: str) -> None:
    call = Caller(version)
    reply = call("POST", "experiments", {"title": "a\nb" + "c" * 300, "custom_id": 7, "date": "2020-01-01", "x": 1})
    assert (reply.status, reply.body) == (201, b"")
    assert reply.location == "https://elab.example.org/api/v2/experiments/1"
    entry = call.get("experiments/1")
    assert entry["title"] == "a b" + "c" * 252
    assert (entry["custom_id"], entry["date"] == "2020-01-01", entry["state"]) == (None, False, 1)
    assert call("POST", "experiments", {}).status == 201
    assert call.get("experiments/2")["title"] == "Untitled"


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("5.3.6", (401, "Unauthorized", "No corresponding API key found!")),
        ("6.0.0", (401, "Authentication required", "No corresponding API key found!")),
    ],
)
@pytest.mark.parametrize("key", ["", f"Bearer {SERVICE_KEY}", "1-0"])
def test_only_the_bare_key_is_a_key(version: str, key: str, expected: tuple[int, str, str]) -> None:
    assert text_of(Caller(version)("GET", "users/me", key=key)) == expected


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "text/plain", ""])
def test_the_content_type_is_exact(kind: str) -> None:
    reply = Caller()("POST", "experiments", {"title": "a"}, headers={"content-type": kind})
    assert text_of(reply) == (400, "Incorrect content-type header.", "")


def test_errors_by_version() -> None:
    assert text_of(Caller("5.3.6")("GET", "experiments/9")) == (
        404,
        "Resource Not Found",
        "Nothing to show with this id",
    )
    assert text_of(Caller("5.6.12")("GET", "experiments/9")) == (404, "Nothing to show with this id", "")
    assert Caller()("GET", "nonsense").status == 400
    assert Caller()("PUT", "experiments").status == 405
    assert respond(Notebook(), Request("GET", "/elsewhere")).kind.startswith("text/html")


def test_a_read_only_key_gets_400() -> None:
    status, message, _ = text_of(Caller()("POST", "experiments", {}, key=READ_ONLY_KEY))
    assert (status, message) == (400, "You are using a read-only key to execute a write action.")


def test_content_type_of_a_body() -> None:
    html = {"body": "<b id='x'>a</b>", "content_type": 1}
    for version, preference, kind, body in (
        ("5.3.6", True, 2, "<b id='x'>a</b>"),
        ("5.3.6", False, 1, "<b>a</b>"),
        ("5.6.12", True, 1, "<b>a</b>"),
    ):
        call = Caller(version, use_markdown=preference)
        call("POST", "experiments", html)
        entry = call.get("experiments/1")
        assert (entry["content_type"], entry["body"]) == (kind, body)


@pytest.mark.parametrize("version", VERSIONS)
def test_metadata_is_an_object_in_a_create_and_a_text_in_a_change(version: str) -> None:
    call = Caller(version)
    call("POST", "experiments", {"metadata": METADATA})
    assert json.loads(call.get("experiments/1")["metadata"]) == METADATA
    assert call("PATCH", "experiments/1", {"metadata": METADATA}).status == 500
    assert call("PATCH", "experiments/1", {"metadata": json.dumps({})}).status == 200
    assert call.get("experiments/1")["metadata"] == "{}"
    call("POST", "experiments", {"metadata": json.dumps(METADATA)})
    stored = json.loads(call.get("experiments/2")["metadata"])
    assert stored == (METADATA if version == "6.0.0" else json.dumps(METADATA))


def test_a_change_goes_key_by_key_without_a_transaction() -> None:
    call = Caller()
    call("POST", "experiments", {"title": "a"})
    reply = call("PATCH", "experiments/1", {"title": "b", "tags": ["x"], "body": "c"})
    assert text_of(reply) == (400, "Invalid update target.", "")
    entry = call.get("experiments/1")
    assert (entry["title"], entry["body"]) == ("b", None)


def test_tags_that_are_refused_leave_the_experiment_behind() -> None:
    call = Caller(tags_forbidden=True)
    assert call("POST", "experiments", {"tags": ["new"]}).status == 400
    assert call.get("experiments/1")["tags"] is None
    assert call("POST", "experiments/1/tags", {"tag": "new"}, key=ADMIN_KEY).status == 201
    assert call("POST", "experiments/1/tags", {"tag": "NEW"}).status == 201
    assert call.get("experiments/1")["tags"] == "new"


@pytest.mark.parametrize(("version", "tags"), [("5.3.6", None), ("5.6.12", "a|b")])
def test_many_tags_at_once(version: str, tags: str | None) -> None:
    call = Caller(version)
    call("POST", "experiments", {})
    assert call("POST", "experiments/1/tags", {"tags": ["a", "b"]}).status == 201
    assert call.get("experiments/1")["tags"] == tags
    call("PATCH", "experiments/1/tags/1", {"action": "unreference"})
    assert [tag["tag"] for tag in call.get("experiments/1/tags")] == (["b"] if tags else [])
    assert call("DELETE", "experiments/1/tags").status == 204
    assert call.get("experiments/1/tags") == []


def test_a_template_takes_only_the_title() -> None:
    call = Caller(force_template=True)
    assert call("POST", "experiments", {"title": "a", "body": "b"}).status == 400
    call("POST", "experiments", {"title": "a", "body": "b", "template": 3})
    assert (call.get("experiments/1")["title"], call.get("experiments/1")["body"]) == ("a", None)


def test_custom_ids_follow_each_other_in_a_category() -> None:
    call = Caller()
    for _ in range(3):
        call("POST", "experiments", {"category": 1})
    assert call.get("experiments/1")["custom_id"] is None
    assert call("PATCH", "experiments/1", {"custom_id": 41}).status == 200
    assert call("PATCH", "experiments/2", {"custom_id": 41}).status == 400
    call("POST", "experiments", {"category": 1})
    assert call.get("experiments/4")["custom_id"] == 42


@pytest.mark.parametrize(("version", "status"), [("5.3.6", 422), ("5.6.12", 400), ("6.0.0", 400)])
def test_what_is_deleted_can_be_read_and_not_changed(version: str, status: int) -> None:
    call = Caller(version)
    call("POST", "experiments", {"metadata": METADATA})
    call.upload("experiments/1/uploads", "a.txt", b"a")
    assert call("DELETE", "experiments/1").status == 204
    assert call.get("experiments/1")["state"] == 3
    assert call.get("experiments/1")["uploads"] == []
    reply = call("PATCH", "experiments/1", {"title": "x"})
    assert (reply.status, json.loads(reply.body)["code"]) == (status, 422)
    assert call.get("experiments") == []
    assert len(call.get("experiments", state="1,2,3")) == 1
    assert call("PATCH", "experiments/1", {"action": "restore"}).status == 200
    assert call.get("experiments/1")["state"] == 1


def test_what_is_locked_is_403_for_its_owner_too() -> None:
    call = Caller()
    call("POST", "experiments", {})
    call("PATCH", "experiments/1", {"action": "lock"})
    assert call("PATCH", "experiments/1", {"title": "x"}).status == 403
    assert call.upload("experiments/1/uploads", "a.txt", b"a").status == 403
    call("PATCH", "experiments/1", {"action": "lock"})
    assert call("PATCH", "experiments/1", {"title": "x"}).status == 200


def test_lists_by_version() -> None:
    for version, count, has_body in (("5.3.6", 15, True), ("5.4.0", 20, True), ("5.6.12", 20, False)):
        call = Caller(version)
        for number in range(20):
            call("POST", "experiments", {"title": str(number), "metadata": METADATA})
        rows = call.get("experiments")
        assert (len(rows), "body" in rows[0], "metadata" in rows[0]) == (count, has_body, has_body)
        assert "metadata" in call.get("experiments", full="1")[0]
        found = call.get(
            "experiments", extended='extrafield:s:"Record key":"0f3a"', order="id", sort="asc", limit="3"
        )
        assert [row["id"] for row in found] == [1, 2, 3]
        assert "metadata" in found[0]


def test_who_may_read_and_write() -> None:
    call = Caller()
    call("POST", "experiments", {"title": "a"})
    assert call.get("experiments/1", key=PERSON_KEY)["fullname"] == "Export Service"
    assert call("PATCH", "experiments/1", {"title": "b"}, key=PERSON_KEY).status == 403
    assert call("PATCH", "experiments/1", {"title": "b"}, key=ADMIN_KEY).status == 200
    assert call("GET", "experiments/1", key=STRANGER_KEY).status == 403
    assert call.get("experiments", key=STRANGER_KEY, scope="3") == []
    call("PATCH", "experiments/1", {"canwrite": json.dumps({"users": [2]})})
    assert call("PATCH", "experiments/1", {"title": "c"}, key=PERSON_KEY).status == 200


@pytest.mark.parametrize(("version", "status"), [("5.3.6", 400), ("5.6.12", 400), ("6.0.0", 200)])
def test_an_owner_can_be_set_from_version_6(version: str, status: int) -> None:
    call = Caller(version)
    call("POST", "experiments", {})
    assert call("PATCH", "experiments/1", {"action": "updateowner", "userid": 2, "team": 1}).status == status
    assert call("PATCH", "experiments/1", {"action": "updateowner", "userid": 2}).status in {400, 403}


def test_attachments() -> None:
    call = Caller()
    call("POST", "experiments", {})
    content = b"\r\n--xy\r\n\0\xff"
    reply = call.upload("experiments/1/uploads", "dir\\é.xml", content, comment="mine")
    assert reply.location == "https://elab.example.org/api/v2/experiments/1/uploads/1"
    found = call.get("experiments/1/uploads/1")
    assert (found["real_name"], found["comment"], found["filesize"]) == ("é.xml", "mine", len(content))
    assert call("GET", "experiments/1/uploads/1", format="binary").body == content
    # without the word one more is added
    call.upload("experiments/1/uploads/1", "b.xml", b"b")
    call.upload("experiments/1/uploads/1", "c.xml", b"c", action="replace")
    assert [u["real_name"] for u in call.get("experiments/1/uploads")] == ["c.xml", "b.xml"]
    assert [u["state"] for u in call.get("experiments/1/uploads", state="1,2,3")] == [1, 1, 2]
    assert call("DELETE", "experiments/1/uploads/2").status == 204
    assert [u["id"] for u in call.get("experiments/1")["uploads"]] == [3]
    assert call.upload("experiments/1/uploads", "x.php", b"").status == 400
    assert call("GET", "experiments/1/uploads/9").status == 404
    none = call("POST", "experiments/1/uploads", b"", headers={"content-type": "multipart/form-data; boundary=x"})
    assert text_of(none)[1] == "Error reading file!"


def test_large_files_have_no_digest() -> None:
    call = Caller()
    call("POST", "experiments", {})
    number = call.notebook.attach(ACCOUNTS[0], 1, "a.bin", bytes(NO_HASH_BYTES), comment="")
    assert call.notebook.uploads[number]["hash"] is None


def test_sizes_have_limits() -> None:
    call = Caller(max_upload_bytes=1_000)
    assert call("POST", "experiments", {"body": "x" * 2_000}).status == 413
    reply = Caller()("POST", "experiments", {"body": "x" * 4_120_001})
    assert text_of(reply) == (400, "Content is too big! Cannot save!", "")


def test_a_duplicate_loses_the_values_that_ask_for_it() -> None:
    call = Caller()
    field = {"value": "x", "blank_value_on_duplicate": True}
    call("POST", "experiments", {"title": "a", "metadata": {"extra_fields": {"k": field, "m": {"value": "y"}}}})
    assert call("POST", "experiments/1", {"action": "duplicate"}, key=PERSON_KEY).status == 201
    entry = call.get("experiments/2")
    fields = json.loads(entry["metadata"])["extra_fields"]
    assert (entry["title"], entry["created_from_id"], entry["userid"]) == ("a I", 1, 2)
    assert (fields["k"]["value"], fields["m"]["value"]) == ("", "y")


def test_an_experiment_that_is_being_edited() -> None:
    call = Caller()
    call("POST", "experiments", {"canwrite_base": 30})
    call("PATCH", "experiments/1", {"action": "exclusiveeditmode"}, key=PERSON_KEY)
    reply = call("PATCH", "experiments/1", {"title": "x"})
    assert text_of(reply) == (400, "This entry is being edited by Ada Lovelace.", "")
    assert call.get("experiments/1")["exclusive_edit_mode"]["locked_by"] == 2
    assert call("PATCH", "experiments/1", {"title": "x"}, key=PERSON_KEY).status == 200


def test_users_as_their_teams_see_them() -> None:
    call = Caller()
    assert [u["userid"] for u in call.get("users", q="ada@example.org")] == [2]
    assert call.get("users", q="alovelace") == []
    assert "orgid" not in call.get("users")[1]
    assert call.get("users", key=ADMIN_KEY)[1]["orgid"] == "alovelace"
    assert [k["can_write"] for k in call.get("apikeys", key=READ_ONLY_KEY)] == [0]
    assert call.get("info")["elabftw_version"] == "6.0.0"


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        ("<p>a<!-- c --></p>", "<p>a</p>"),
        ('<p id="x" onclick="y" style="z">a</p>', "<p>a</p>"),
        ("<script>x</script><b>a</b>", "<b>a</b>"),
        ("<table><thead><tr><td>1</td></tr></thead></table>", "<table><tr><td>1</td></tr></table>"),
        ('<a href="javascript:x">a</a>', "<a>a</a>"),
        ('<a href="https://x/?a=1&amp;b=2" target="_blank">a</a>', '<a href="https://x/?a=1&amp;b=2">a</a>'),
        ('<img src="data:image/png;base64,AA" alt="x">', '<img alt="x">'),
        ("<section>a <em>b</em></section> c", "a <em>b</em> c"),
        ("plain &amp; text", "plain &amp; text"),
        (" ", ""),
    ],
)
def test_bodies_are_purified(body: str, kept: str) -> None:
    assert purified(body) == kept
    assert purified(kept) == kept


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ('extrafield:s:"Record key":"0f3a"', True),
        ('extrafield:s:"record KEY":"0F3A"', True),
        ('extrafield:s:"Record key":"0f3"', False),
        ('extrafield:s:"Record key":"0f%"', True),
        ('extrafield:s:"Record key":"0f3_"', True),
        (r'extrafield:s:"Record key":"0f3\_"', False),
        ('extrafield:"Record key":"f3"', True),
        ("extrafield:s:**:0f3a", True),
        ('extrafield:s:"other":"0f3a"', False),
        ("title:tit AND id:7", True),
        ("title:s:tit", False),
        ("NOT title:tit", False),
        ("(id:1 OR id:7) state:1", True),
        ("id:>7", False),
        ("date:2026-01-01..2026-02-01", True),
        ("date:>=2026-01-06", False),
        ("owner:ada", True),
        ("tan", True),
    ],
)
def test_the_extended_search(query: str, *, found: bool) -> None:
    entry = {"id": 7, "title": "titan", "state": 1, "date": "2026-01-05", "fullname": "Ada L"}
    assert compile_search(query)({**entry, "metadata": json.dumps(METADATA)}) is found


@pytest.mark.parametrize("query", ["tag:x", "extrafield:s:Record key:x", "(a", 'title:"', "id:x", "AND", "a)"])
def test_what_is_no_search(query: str) -> None:
    with pytest.raises(SearchError):
        compile_search(query)
    reply = Caller()("GET", "experiments", extended=query)
    assert text_of(reply)[1].startswith("Error with extended search: <br>")


def test_metadata_that_was_encoded_twice_has_no_fields() -> None:
    entry = {"metadata": json.dumps(json.dumps(METADATA))}
    assert not compile_search("extrafield:s:**:0f3a")(entry)


def test_like_takes_the_whole_value() -> None:
    assert like("a%", "A\nb")
    assert not like("a", "ab")
    assert like(r"100\%", "100%")
    assert not like(r"100\%", "1000")


def test_faults_are_used_up() -> None:
    faults = Faults([Fault.of({"kind": "cut", "path": "/uploads", "skip": 1, "times": 2})])
    asked = [faults.take("POST", "/api/v2/experiments/1/uploads") is not None for _ in range(5)]
    assert asked == [False, True, True, False, False]
    assert faults.take("GET", "/uploads") is None
    with pytest.raises(ValueError, match="unknown kind"):
        Fault.of({"kind": "x"})
    with pytest.raises(TypeError):
        Fault.of({"kind": "cut", "x": 1})
