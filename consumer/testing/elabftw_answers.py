"""How eLabFTW's test server answers a request, as API v2 of its version does. For tests of plugins only."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any

from consumer.testing.elabftw_accounts import ACCOUNTS, CATEGORIES, STATUSES, Account, Refused
from consumer.testing.elabftw_search import SearchError, Test, compile_search
from consumer.testing.elabftw_store import Notebook

API = "/api/v2/"

_JSON = "application/json"
_HTML = "text/html; charset=UTF-8"
_DEFAULT_LIMIT = 15
_PART_NAME = re.compile(rb'[; ]name="([^"]*)"')
_FILE_NAME = re.compile(rb'filename="([^"]*)"')
_OLD_TEXTS = {400: "Bad Request", 403: "Access Forbidden", 404: "Resource Not Found", 422: "Unprocessable Content"}


@dataclass(frozen=True, slots=True)
class Request:
    """A request as it came; ``query`` holds each name once, except ``tags[]``."""

    method: str
    path: str
    query: dict[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer."""

    status: int
    body: bytes = b""
    kind: str = _JSON
    location: str | None = None


def page(status: int, text: str) -> Reply:
    """Return the HTML page of the web server before the application."""
    return Reply(status, f"<html><body><h1>{status} {text}</h1><hr>nginx</body></html>".encode(), _HTML)


def account_of(request: Request) -> Account | None:
    """Return whose key a request has: the bare key, nothing before it."""
    key = request.headers.get("authorization", "")
    return next((account for account in ACCOUNTS if account.key == key), None)


def respond(notebook: Notebook, request: Request) -> Reply:
    """Answer one request, and change what it changes."""
    if request.method not in {"GET", "HEAD", "POST", "DELETE", "OPTIONS", "PATCH"}:
        return page(405, "Not Allowed")
    if not request.path.startswith(API):
        return page(404, "Not Found")
    if len(request.body) > notebook.settings.max_upload_bytes:
        return page(413, "Request Entity Too Large")
    account = account_of(request)
    old = notebook.settings.number < (5, 4)
    if account is None:
        message = "Unauthorized" if old else "Authentication required"
        return _json(401, {"code": 401, "message": message, "description": "No corresponding API key found!"})
    try:
        return _Answer(notebook, request, account).reply()
    except Refused as refused:
        texts = (_OLD_TEXTS.get(refused.status, "Error"), refused.text) if old else (refused.text, "")
        return _json(refused.status, {"code": refused.code, "message": texts[0], "description": texts[1]})


def _json(status: int, value: Any) -> Reply:
    return Reply(status, json.dumps(value).encode())


class _Answer:
    def __init__(self, notebook: Notebook, request: Request, account: Account) -> None:
        self._notebook = notebook
        self._settings = notebook.settings
        self._request = request
        self._account = account
        self._parts = [part for part in request.path.removeprefix(API).split("/") if part]

    def reply(self) -> Reply:
        method = self._request.method
        if method != "GET" and not self._account.can_write:
            raise Refused(400, "You are using a read-only key to execute a write action.")
        is_file = len(self._parts) > 2 and self._parts[2] == "uploads" and method == "POST"  # noqa: PLR2004
        if method in {"POST", "PATCH"} and not is_file and self._request.headers.get("content-type") != _JSON:
            raise Refused(400, "Incorrect content-type header.")
        match self._parts:
            case ["experiments"]:
                return self._created(self._create()) if method == "POST" else self._list()
            case ["experiments", number]:
                return self._one(_number(number))
            case ["experiments", number, "tags", *more]:
                return self._tags(_number(number), more)
            case ["experiments", number, "uploads", *more]:
                return self._uploads(_number(number), [_number(part) for part in more])
        return self._around(self._parts)

    def _around(self, parts: list[str]) -> Reply:
        """Answer what is not about experiments."""
        numbers = dict(zip(("major", "minor"), self._settings.number, strict=True))
        team = {"id": self._account.team, "name": "Microscopy", "force_exp_tpl": int(self._settings.force_template)}
        users = self._notebook.users(self._account)
        answers: dict[tuple[str, ...], Callable[[], Any]] = {
            ("info",): lambda: {
                "elabftw_version": self._settings.version,
                "elabftw_version_int": numbers["major"] * 10_000 + numbers["minor"] * 100,
            },
            ("users", "me"): lambda: next(u for u in users if u["userid"] == self._account.userid),
            ("users",): lambda: [u for u in users if self._matches(u)],
            ("apikeys",): lambda: [
                {"id": other.number, "name": "key", "can_write": int(other.can_write), "team": other.team}
                for other in ACCOUNTS if other.userid == self._account.userid
            ],
            ("teams", "current"): lambda: team,
            ("teams", "current", "experiments_categories"): lambda: list(CATEGORIES),
            ("teams", "current", "experiments_status"): lambda: list(STATUSES),
            ("teams", "current", "status"): lambda: list(STATUSES),
        }  # fmt: skip
        answer = answers.get(tuple(parts))
        if answer is None or self._request.method != "GET":
            raise Refused(400, "Incorrect endpoint.")
        return _json(200, answer())

    def _matches(self, user: dict[str, Any]) -> bool:
        wanted = self._request.query.get("q", "").lower()
        return any(wanted in str(user.get(name) or "").lower() for name in ("firstname", "lastname", "email"))

    # --- experiments -------------------------------------------------------------------------------------------

    def _create(self) -> int:
        return self._notebook.create(self._account, self._object())

    def _created(self, number: int) -> Reply:
        # from the settings, not from the address that was asked
        where = f"{self._settings.site_url}{API}experiments/{number}"
        return Reply(201, b"", _HTML, where)

    def _one(self, number: int) -> Reply:
        match self._request.method:
            case "PATCH":
                self._notebook.patch(self._account, number, self._object())
            case "POST":
                if self._object().get("action") != "duplicate":
                    raise Refused(400, "Invalid action.")
                return self._created(self._notebook.duplicate(self._account, number))
            case "DELETE":
                self._notebook.delete(self._account, number)
                return Reply(204)
        return _json(200, self._whole(self._notebook.readable(self._account, number)))

    def _whole(self, entry: dict[str, Any]) -> dict[str, Any]:
        uploads = [u for u in self._notebook.uploads.values() if u["item_id"] == entry["id"] and u["state"] == 1]
        metadata = entry["metadata"]
        editor = entry["edited_by"]
        more = {
            "body_html": entry["body"],
            "uploads": uploads[::-1],
            "comments": [],
            "steps": [],
            "items_links": [],
            "experiments_links": [],
            "changelog": [],
            "page": "experiments",
            "type": "experiments",
            "sharelink": f"{self._settings.site_url}/experiments.php?mode=view&id={entry['id']}",
            "exclusive_edit_mode": {"locked_by": editor, "is_stale": 0} if editor else [],
        }
        if metadata is not None:
            more["metadata_decoded"] = json.loads(metadata)
        return dict(sorted({**self._row(entry), **more}.items()))

    def _row(self, entry: dict[str, Any]) -> dict[str, Any]:
        titles = {
            "category_title": {c["id"]: c["title"] for c in CATEGORIES}.get(entry["category"]),
            "status_title": {s["id"]: s["title"] for s in STATUSES}.get(entry["status"]),
        }
        tags = entry["tags"]
        joined = {
            "tags": "|".join(tags) or None,
            "tags_id": ",".join(str(self._notebook.tags[tag]) for tag in tags) or None,
        }
        row = {name: value for name, value in entry.items() if name != "edited_by"}
        return {**row, **titles, **joined, "fullname": self._notebook.fullname(entry["userid"])}

    def _list(self) -> Reply:
        query = self._request.query
        rows = [
            row for row in map(self._row, self._notebook.experiments.values())
            if self._notebook.may_read(self._account, self._notebook.experiments[row["id"]]) and self._wanted(row)
        ]  # fmt: skip
        test = self._search(query.get("extended", ""))
        rows = [row for row in rows if test(row)]
        order = {"id": "id", "title": "title", "date": "date", "lastchange": "modified_at"}.get(
            query.get("order", "date"), "date"
        )
        rows.sort(key=lambda row: (row[order], row["id"]), reverse=query.get("sort", "desc") != "asc")
        default = _DEFAULT_LIMIT if self._settings.number < (5, 4) else len(rows)
        start = int(query.get("offset") or 0)
        rows = rows[start : start + (int(query.get("limit") or 0) or default)]
        if self._settings.number >= (5, 6) and query.get("full") != "1" and not query.get("extended"):
            rows = [{name: row[name] for name in row if name not in {"body", "metadata"}} for row in rows]
        return _json(200, rows)

    def _wanted(self, row: dict[str, Any]) -> bool:
        query = self._request.query
        states = query.get("state", "1").split(",")
        own_only = query.get("scope", "2") == "1" and not query.get("extended")
        text = query.get("q", "").lower()
        return (
            str(row["state"]) in states
            and not (own_only and row["userid"] != self._account.userid)
            and (query.get("scope", "2") == "3" or row["team"] == self._account.team)
            and query.get("owner", str(row["userid"])) == str(row["userid"])
            and query.get("category", str(row["category"])) == str(row["category"])
            and text in f"{row['title']} {row['body'] or ''} {row['elabid']}".lower()
            and {tag.casefold() for tag in self._request.tags}
            <= {tag.casefold() for tag in (row["tags"] or "").split("|")}
        )

    def _search(self, text: str) -> Test:
        if not text:
            return lambda _row: True
        try:
            return compile_search(text)
        except SearchError as error:
            raise Refused(400, f"Error with extended search: <br>{escape(str(error))}") from None

    # --- tags and attachments ----------------------------------------------------------------------------------

    def _tags(self, number: int, more: list[str]) -> Reply:
        entry = self._notebook.readable(self._account, number)
        match self._request.method:
            case "POST":
                body = self._object()
                texts = [body["tag"]] if isinstance(body.get("tag"), str) else []
                if self._settings.number >= (5, 4) and isinstance(body.get("tags"), list):
                    texts = body["tags"]
                tag = 0
                for text in texts:
                    tag = self._notebook.add_tag(self._account, entry, str(text))
                created = self._created(number)
                return Reply(201, b"", _HTML, f"{created.location}/tags/{tag}")
            case "DELETE":
                self._notebook.writable(self._account, entry)
                entry["tags"].clear()
                return Reply(204)
            case "PATCH":
                if self._object().get("action") != "unreference":
                    raise Refused(400, "Invalid action for tags.")
                self._notebook.writable(self._account, entry)
                gone = {text for text, tag in self._notebook.tags.items() if str(tag) in more}
                entry["tags"] = [text for text in entry["tags"] if text not in gone]
        return _json(200, [{"tag": text, "tag_id": self._notebook.tags[text]} for text in entry["tags"]])

    def _uploads(self, number: int, more: list[int]) -> Reply:
        self._notebook.readable(self._account, number)
        match self._request.method, more:
            case "POST", _:
                return self._attach(number, more[0] if more else 0)
            case "GET", []:
                states = self._request.query.get("state", "1").split(",")
                found = [
                    upload for upload in self._notebook.uploads.values()
                    if upload["item_id"] == number and str(upload["state"]) in states
                ]  # fmt: skip
                return _json(200, found[::-1])
        upload = self._notebook.upload(number, more[0])
        match self._request.method:
            case "DELETE" | "PATCH":
                self._notebook.writable(self._account, self._notebook.experiments[number])
                if self._request.method == "DELETE":
                    upload["state"] = 3
                    return Reply(204)
                body = self._object()
                upload.update({name: body[name] for name in ("comment", "real_name") if name in body})
        if self._request.query.get("format") == "binary":
            return Reply(200, self._notebook.contents[more[0]], "application/octet-stream")
        return _json(200, upload)

    def _attach(self, number: int, upload: int) -> Reply:
        fields, name, content = _form(self._request)
        if content is None:
            raise Refused(400, "Error reading file!")
        # without the word a file is only added
        replaces = upload if fields.get("action") == "replace" else 0
        comment = fields.get("comment", "")
        new = self._notebook.attach(self._account, number, name, content, comment=comment, replaces=replaces)
        return Reply(201, b"", _HTML, f"{self._settings.site_url}{API}experiments/{number}/uploads/{new}")

    def _object(self) -> dict[str, Any]:
        if not self._request.body:
            return {}
        try:
            value = json.loads(self._request.body)
        except ValueError:
            raise Refused(400, "Error decoding json payload") from None
        return value if isinstance(value, dict) else {}


def _number(text: str) -> int:
    if not text.isdigit():
        raise Refused(400, "Incorrect id.")
    return int(text)


def _form(request: Request) -> tuple[dict[str, str], str, bytes | None]:
    """Read a multipart form: its texts, and the name and bytes of its file."""
    found = re.search(r'boundary="?([^";]+)', request.headers.get("content-type", ""))
    fields: dict[str, str] = {}
    name, content = "", None
    if not found:
        return fields, name, content
    for part in (b"\r\n" + request.body).split(b"\r\n--" + found[1].encode())[1:-1]:
        head, _, value = part.partition(b"\r\n\r\n")
        field_name = _PART_NAME.search(head)
        file_name = _FILE_NAME.search(head)
        if file_name and field_name and field_name[1] == b"file":
            # PHP keeps what follows the last slash of either kind
            name, content = re.split(r"[/\\]", file_name[1].decode(errors="replace"))[-1], value
        elif field_name:
            fields[field_name[1].decode(errors="replace")] = value.decode(errors="replace")
    return fields, name, content
