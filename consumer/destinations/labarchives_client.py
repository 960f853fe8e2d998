"""The API of LabArchives: signed requests, its clock, its pace and its answers; one method a call.

The signature is part of the address, so no address goes into a log or an error; both name the API method only.
LabArchives tells errors in the body, with 200, 401, 404 or 500, so the body is read before the status is judged.
"""

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import httpx
from lxml import etree

from consumer.destinations.contract import request_turn
from consumer.destinations.http import HttpClient, TlsSettings, one_line, retry_after_seconds
from consumer.destinations.labarchives_rules import Entry, Node, plain_text
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient, UnknownOutcome

#: Attachments are stored before they are answered.
READ_SECONDS = 130.0
ANSWER_BYTES = 32 * 1024**2
ROOT = "0"

_CLOCK = {4504, 4520}
_SETTINGS = {
    4504: "the clocks differ even after asking LabArchives for its time",
    4506: "check NX_LABARCHIVES_ACCESS_KEY_ID",
    4507: "check NX_LABARCHIVES_ACCESS_KEY_ID, NX_LABARCHIVES_ACCESS_PASSWORD and NX_LABARCHIVES_USER_ID",
    4514: "check NX_LABARCHIVES_USER_ID",
    4520: "the signature is not accepted, check NX_LABARCHIVES_ACCESS_PASSWORD",
    4533: "the user id was revoked, set a new NX_LABARCHIVES_USER_ID",
}
_NO_PERMISSION = {4501, 4502, 4547}
_REFUSED = {4500, 4529}
_SERVER_TROUBLE = 4999
_CREDENTIALS = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, HTTPStatus.PROXY_AUTHENTICATION_REQUIRED}
_NOT_THERE = {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED}
_SIGNED = re.compile(r"\S*\b(sig|akid|uid|password|expires)=\S*")
_MILLISECONDS = re.compile(rb"\d{13}")


@dataclass(frozen=True, slots=True)
class Place:
    """Where an entry goes: a page of a notebook."""

    notebook: str
    page: str


def signature(password: str, key_id: str, method: str, expires: int) -> str:
    """Sign one call; ``method`` without its class, ``expires`` in ms since 1970: the time now, despite its name."""
    message = f"{key_id}{method}{expires}".encode()
    return base64.b64encode(hmac.digest(password.encode(), message, hashlib.sha512)).decode()


def problem(
    method: str, status: int, code: int | None, said: str, *, creates: bool, retry_after: float | None = None
) -> DestinationError | None:
    """Say what an answer means that is no success; None for a success. ``said`` is shown, so it holds no secrets."""
    text = f"LabArchives answered {code or status} to {method}" + (f": {said}" if said else "")
    told = _problem_of_code(text, code)
    if told is not None:
        return told
    trouble = status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.REQUEST_TIMEOUT
    if code == _SERVER_TROUBLE or trouble:
        return _lost(text, "server_error", retry_after, creates=creates)
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return Transient(text, retry_after=retry_after, code="rate_limited")
    if code is not None:
        return Permanent(text, code="rejected")
    return None if status == HTTPStatus.OK else _problem_of_status(text, status, creates=creates)


def _problem_of_code(text: str, code: int | None) -> DestinationError | None:
    """Judge a code that says the same with any status."""
    if code in _SETTINGS:
        return Misconfigured(f"{text}; {_SETTINGS[code]}")
    if code in _NO_PERMISSION:
        return Permanent(text, code="not_permitted")
    return Permanent(text, code="rejected") if code in _REFUSED else None


def _problem_of_status(text: str, status: int, *, creates: bool) -> DestinationError:
    """Judge an answer that only has a status; it may come from something before LabArchives."""
    if status in _CREDENTIALS:
        return Misconfigured(f"{text}; {_SETTINGS[4507]}")
    if status < HTTPStatus.BAD_REQUEST or status in _NOT_THERE:
        return Misconfigured(f"{text}; is NX_LABARCHIVES_URL right?")
    if not creates:  # a question that was not answered says nothing of the record
        return Transient(text, code="no_answer")
    return Permanent(text, code="too_large" if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE else "rejected")


def _lost(text: str, code: str, retry_after: float | None, *, creates: bool) -> DestinationError:
    if creates:
        return UnknownOutcome(text, retry_after=retry_after)
    return Transient(text, retry_after=retry_after, code=code)


class LabArchivesClient:
    """Calls LabArchives with one access key; ``interval_seconds`` is the least time between two requests.

    Every method takes the ``uid`` to act for. Nothing is sent twice, but for a request that was refused because the
    clocks differ: it has had no effect, and goes out once more with LabArchives' own time.
    """

    def __init__(
        self, url: str, tls: TlsSettings, *, key_id: str, password: str, interval_seconds: float = 1.0
    ) -> None:
        self._http = HttpClient(
            url, tls, setting="NX_LABARCHIVES_URL", read_seconds=READ_SECONDS, max_body_bytes=ANSWER_BYTES
        )
        self._key_id = key_id
        self._password = password
        self._pace = _Pace(interval_seconds)
        self._offset_ms = 0
        _keep_addresses_out_of_logs()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def clock_offset_seconds(self) -> float:
        """Ask LabArchives for its time, sign with it from now on, and return by how much it is ahead of ours."""
        started = _now_ms()
        params = {"akid": self._key_id}
        answer = await self._send("GET", "utilities/epoch_time", params, creates=False)
        self._tree(answer, "epoch_time", creates=False)
        found = _MILLISECONDS.search(answer.content)
        if found is None:
            raise Transient("LabArchives answered no time to epoch_time", code="no_answer")
        self._offset_ms = int(found[0]) - (started + _now_ms()) // 2
        return self._offset_ms / 1000

    async def notebooks(self, uid: str) -> dict[str, str]:
        """Return the names of the user's notebooks by id; proves access key and uid."""
        root = await self._read("users/user_info_via_id", uid, {}, roots={"users"})
        if root is None:
            raise Misconfigured(f"LabArchives knows no such user; {_SETTINGS[4514]}")
        found = root.iterfind(".//notebook")
        return {_text(item, "id"): _text(item, "name") for item in found}

    async def max_file_size(self, uid: str) -> int | None:
        """Return the bytes that an attachment may have; None if LabArchives does not tell."""
        root = await self._read("users/max_file_size", uid, {}, roots={"users"})
        return None if root is None else _number(_text(root, ".//max-file-size"))

    async def children(self, uid: str, notebook: str, parent: str) -> list[Node]:
        """Return the folders and pages in a folder (``ROOT``: of the notebook)."""
        params = {"nbid": notebook, "parent_tree_id": parent}
        root = await self._read("tree_tools/get_tree_level", uid, params, roots={"tree-tools"})
        nodes = [] if root is None else list(root.iterfind(".//level-node"))
        found = [
            Node(_text(n, "tree-id"), _text(n, "display-text"), _text(n, "is-page").casefold() == "true")
            for n in nodes
        ]
        if any(not node.id or n.find("is-page") is None for node, n in zip(found, nodes, strict=True)):
            raise Transient("LabArchives answered nodes without id or kind to get_tree_level", code="no_answer")
        return found

    async def insert(self, uid: str, notebook: str, parent: str, name: str, *, folder: bool) -> str:
        """Make a folder or page and return its id. It is a GET with an effect."""
        params = {"nbid": notebook, "parent_tree_id": parent, "display_text": name}
        params["is_folder"] = "true" if folder else "false"
        root = await self._create("GET", "tree_tools/insert_node", uid, params)
        return _new_id(root, ".//node/tree-id", "insert_node")

    async def entries(self, uid: str, notebook: str, page: str) -> list[Entry]:
        """Return the entries of a page."""
        params = {"nbid": notebook, "page_tree_id": page, "entry_data": "true"}
        root = await self._read("tree_tools/get_entries_for_page", uid, params, roots={"tree-tools", "entries"})
        found = [] if root is None else [_entry(element) for element in root.iterfind(".//entry")]
        if not all(entry.id and entry.part_type for entry in found):
            raise Transient(
                "LabArchives answered entries without id or type to get_entries_for_page", code="no_answer"
            )
        return found

    async def entry(self, uid: str, entry_id: str) -> Entry | None:
        """Return one entry; None if there is none with the id."""
        params = {"eid": entry_id, "entry_data": "true"}
        try:
            root = await self._read("entries/entry_info", uid, params, roots={"entries", "entry"})
        except Permanent as error:
            if error.code == "rejected":  # an id that is none
                return None
            raise
        found = None if root is None else next(root.iter("entry"), None)
        return None if found is None else _entry(found)

    async def add_text(self, uid: str, place: Place | None, text: str) -> str:
        """Add an HTML text to a page, without one to the user's inbox, and return its id."""
        params = {**_where(place), "part_type": "text entry"}
        root = await self._create("POST", "entries/add_entry", uid, params, data={"entry_data": text})
        return _new_id(root, ".//entry/eid", "add_entry")

    async def add_file(self, uid: str, place: Place | None, name: str, caption: str, content: bytes) -> str:
        """Add an attachment to a page, without one to the user's inbox, and return its id."""
        described = {"filename": name, "caption": caption, "change_description": "exported by nexus-export"}
        params = {**_where(place), **described}
        headers = {"Content-Type": "application/octet-stream"}
        root = await self._create("POST", "entries/add_attachment", uid, params, content=content, headers=headers)
        return _new_id(root, ".//entry/eid", "add_attachment")

    async def _read(self, path: str, uid: str, params: Mapping[str, str], *, roots: set[str]) -> Any:
        """Ask for something; None is an answer too: some methods say 404 where there is nothing."""
        root = await self._call("GET", path, uid, params, creates=False)
        if root is not None and root.tag not in roots:
            message = f"LabArchives answered <{one_line(str(root.tag))}> to {_method(path)}"
            raise Transient(message, code="no_answer")
        return root

    async def _create(self, verb: str, path: str, uid: str, params: Mapping[str, str], **parts: Any) -> Any:
        return await self._call(verb, path, uid, params, creates=True, **parts)

    async def _call(
        self, verb: str, path: str, uid: str, params: Mapping[str, str], *, creates: bool, **parts: Any
    ) -> Any:
        """Send a signed request and return the root of its answer."""
        try:
            answer = await self._send(verb, path, params, uid=uid, creates=creates, **parts)
            if _error(_parse(answer.content))[0] in _CLOCK:
                await self.clock_offset_seconds()
                answer = await self._send(verb, path, params, uid=uid, creates=creates, **parts)
            return self._tree(answer, _method(path), creates=creates, uid=uid)
        except DestinationError:
            self._pace.failed()
            raise

    async def _send(
        self, verb: str, path: str, params: Mapping[str, str], *, uid: str = "", creates: bool, **parts: Any
    ) -> httpx.Response:
        """Wait for the turn, sign (a signature lasts two minutes) and send."""
        await self._pace.turn()
        signed = {**params, **self._signature(_method(path), uid)} if uid else dict(params)
        return await self._http.request(
            verb, path, params=signed, creates=creates, pass_through=range(300, 600), **parts
        )

    def _signature(self, method: str, uid: str) -> dict[str, str]:
        expires = _now_ms() + self._offset_ms
        signed = signature(self._password, self._key_id, method, expires)
        return {"akid": self._key_id, "expires": str(expires), "sig": signed, "uid": uid}

    def _tree(self, answer: httpx.Response, method: str, *, creates: bool, uid: str = "") -> Any:
        """Return the root of an answer, None for a 404 that says "nothing there"; raises for anything else."""
        root = _parse(answer.content)
        code, description = _error(root)
        said = self._quotable(description, uid)
        is_xml = root is not None and str(root.tag).casefold() != "html"
        nothing = is_xml or not answer.content.strip()
        if answer.status_code == HTTPStatus.NOT_FOUND and code is None and not creates and nothing:
            return None
        wait = retry_after_seconds(answer.headers)
        found = problem(method, answer.status_code, code, said, creates=creates, retry_after=wait)
        if found is not None:
            raise found
        if not is_xml:
            raise _lost(f"LabArchives answered no XML to {method}", "no_answer", None, creates=creates)
        return root

    def _quotable(self, text: str, uid: str) -> str:
        """Return what LabArchives said, in one line and without what it may repeat of the request."""
        for secret in (self._password, self._key_id, uid):
            for shape in {secret, quote(secret, safe="")} - {""}:
                text = text.replace(shape, "***")
        return one_line(_SIGNED.sub("***", text))


class _Pace:
    """Keeps requests apart: the engine's turn is for all processes of a key, the interval for calls by hand too."""

    def __init__(self, interval_seconds: float) -> None:
        self._interval = interval_seconds
        self._lock = asyncio.Lock()
        self._free_at = 0.0

    async def turn(self) -> None:
        async with self._lock:
            await request_turn.get()()
            wait = self._free_at - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            self._free_at = time.monotonic() + self._interval

    def failed(self) -> None:
        """Count the interval from now: LabArchives asks for it after a failure, and may still be at the request."""
        self._free_at = time.monotonic() + self._interval


def _method(path: str) -> str:
    return path.rpartition("/")[2]


def _where(place: Place | None) -> dict[str, str]:
    return {} if place is None else {"nbid": place.notebook, "pid": place.page}


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _parse(content: bytes) -> Any:
    """Return the root of an answer, None if it is no XML. Bytes, since the header names no charset."""
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, remove_comments=True)
    try:
        return etree.fromstring(content, parser)
    except (etree.XMLSyntaxError, ValueError):
        return None


def _error(root: Any) -> tuple[int | None, str]:
    """Return code and description of an error answer, in its new and its old form."""
    if root is None:
        return None, ""
    code = _number(_text(root, ".//error-code"))
    if code is None and "error" in str(root.tag):
        code = _number(_text(root, ".//code"))
    return code, _text(root, ".//error-description") or _text(root, ".//msg")


def _text(element: Any, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def _entry(element: Any) -> Entry:
    return Entry(
        id=_text(element, "eid"),
        part_type=_text(element, "part-type"),
        text=plain_text(_text(element, "entry-data") or _text(element, "entry_data")),
        caption=" ".join(_text(element, "caption").split()),
        file_name=_text(element, "attach-file-name"),
        size=_number(_text(element, "attach-file-size")),
    )


def _new_id(root: Any, path: str, method: str) -> str:
    found = _text(root, path)
    if not found:
        raise UnknownOutcome(f"LabArchives answered no id to {method}")
    return found


class _NoSignedAddress(logging.Filter):
    """httpx tells every address at INFO."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "sig=" not in record.getMessage() and "akid=" not in record.getMessage()


_no_signed_address = _NoSignedAddress()


def _keep_addresses_out_of_logs() -> None:
    logging.getLogger("httpx").addFilter(_no_signed_address)
