"""The API of LabArchives as a test server answers it, from a request's signature to its XML; for tests only."""

import asyncio
import base64
import hashlib
import hmac
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl
from xml.etree import ElementTree as ET

from aiohttp import web

from consumer.testing import labarchives_xml as xml
from consumer.testing.labarchives_faults import Fault, Faults, Ledger, Line
from consumer.testing.labarchives_notebook import Node, Notebooks, NotFoundError, StoredEntry, User, opaque

WINDOW_MS = 120_000
FORM_BYTES = 1_000_000
LARGEST_BYTES = 600 * 1024**2

KEY_ID = "test-akid-0001"
PASSWORD = "test-password"  # noqa: S105 - of a server for tests

#: Which HTTP status comes with a code is not told anywhere; clients have seen all of these.
_STATUSES = {4504: 401, 4506: 401, 4514: 404, 4520: 401, 4533: 401, 4500: 400, 4529: 400, 4501: 403, 4999: 500}
_HTML = "<html><body><h1>{status} {said}</h1></body></html>"


class ApiError(Exception):
    """Something that LabArchives refuses, by its number."""

    def __init__(self, code: int, description: str, status: int | None = None) -> None:
        super().__init__(description)
        self.code = code
        self.description = description
        self.status = status or _STATUSES.get(code, 400)


@dataclass
class Call:
    """One request: its parameters, from address and form together, and its raw body."""

    method: str
    verb: str
    params: dict[str, str]
    body: bytes = b""
    content_type: str = ""

    def need(self, *names: str) -> list[str]:
        """Return parameters that must be there."""
        lacking = [name for name in names if not self.params.get(name)]
        if lacking:
            raise ApiError(4500, f"The {', '.join(lacking)} parameter is required")
        return [self.params[name] for name in names]

    @property
    def wants_data(self) -> bool:
        """Tell whether the text of entries is asked for."""
        return self.params.get("entry_data", "").lower() == "true"


#: What answers a method: a document, or the address that it redirects to.
Work = Callable[[Call], ET.Element | bytes]


@dataclass
class Options:
    """What can be set when it starts or through the control interface."""

    key_id: str = KEY_ID
    password: str = PASSWORD
    max_file_size: int = 100 * 1024**2
    clock_offset_seconds: float = 0.0
    interval_seconds: float = 1.0
    #: errors with HTTP 200, as some clients have seen, instead of a status that fits
    errors_with_200: bool = False
    old_errors: bool = False
    #: an empty list as 404 without a code
    empty_is_404: bool = False


class LabArchivesServer:
    """The API; ``handle`` takes one request from its signature to its answer."""

    def __init__(self, options: Options, notebooks: Notebooks, ledger: Ledger) -> None:
        self.options = options
        self.notebooks = notebooks
        self.ledger = ledger
        self.faults = Faults()
        self._late: set[asyncio.Task[None]] = set()
        self._methods: dict[str, tuple[str, Work]] = {
            "utilities/epoch_time": ("GET", self._epoch_time),
            "users/user_access_info": ("GET", self._user_access_info),
            "users/user_info_via_id": ("GET", self._user_info),
            "users/max_file_size": ("GET", self._max_file_size),
            "notebooks/notebook_info": ("GET", self._notebook_info),
            "tree_tools/get_tree_level": ("GET", self._get_tree_level),
            "tree_tools/insert_node": ("GET POST", self._insert_node),
            "tree_tools/update_node": ("GET POST", self._update_node),
            "tree_tools/get_entries_for_page": ("GET", self._get_entries),
            "entries/add_entry": ("POST", self._add_entry),
            "entries/update_entry": ("POST", self._update_entry),
            "entries/add_attachment": ("POST", self._add_attachment),
            "entries/update_attachment": ("POST", self._update_attachment),
            "entries/entry_info": ("GET", self._entry_info),
            "entries/entry_attachment": ("GET", self._entry_attachment),
        }

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        path = request.match_info["path"]
        call = await self._call(request, path.rpartition("/")[2])
        line = self.ledger.arrived(
            call.params.get("akid", ""), method=call.method, verb=call.verb, uid=call.params.get("uid", ""),
            params={name: text for name, text in call.params.items() if name != "entry_data"},
            body_bytes=len(call.body),
        )  # fmt: skip
        try:
            answer = await self._answer(request, path, call, line)
            line.status = answer.status
            return answer
        finally:
            self.ledger.answered(line)

    async def _call(self, request: web.Request, method: str) -> Call:
        body = await request.read()
        params = dict(request.query)
        if request.content_type == "application/x-www-form-urlencoded":
            params |= parse_qsl(body.decode(), keep_blank_values=True)
        return Call(method, request.method, params, body, request.headers.get("Content-Type", ""))

    async def _answer(self, request: web.Request, path: str, call: Call, line: Line) -> web.StreamResponse:
        verbs, work = self._methods.get(path, ("", None))
        if work is None:
            return _page(404, "not found")
        if call.verb not in verbs.split():
            return _page(405, "method not allowed")
        if call.content_type.startswith("application/x-www-form-urlencoded") and len(call.body) > FORM_BYTES:
            return _page(413, "Request Entity Too Large")
        fault = self.faults.take(call.method)
        line.fault = None if fault is None else vars(fault).copy()
        if fault is not None and fault.when == "late":
            self._commit_late(fault.seconds, work, call, line)
        if fault is not None and fault.when != "after":
            return await self._troubled(fault, request, b"")
        return await self._worked(request, work, call, line, fault)

    async def _worked(
        self, request: web.Request, work: Work, call: Call, line: Line, fault: Fault | None
    ) -> web.StreamResponse:
        """Let a request have its effect, and answer it."""
        try:
            self._check(call)
            result = work(call)
        except (ApiError, NotFoundError) as error:
            return self._refused(error, line)
        line.effect = True
        if isinstance(result, bytes):
            return web.Response(status=302, headers={"Location": result.decode()})
        answer = xml.document(result)
        if fault is not None:
            return await self._troubled(fault, request, answer)
        empty = self.options.empty_is_404 and call.method.startswith("get_") and b"<eid>" not in answer
        return _xml(answer, 404 if empty and b"<tree-id>" not in answer else 200)

    def _refused(self, error: ApiError | NotFoundError, line: Line) -> web.Response:
        if isinstance(error, NotFoundError):
            error = ApiError(4529, "The value of a parameter is invalid", 404)
        line.code = error.code
        body = xml.document(xml.error(error.code, error.description, old_form=self.options.old_errors))
        return _xml(body, 200 if self.options.errors_with_200 else error.status)

    async def _troubled(self, fault: Fault, request: web.Request, answer: bytes) -> web.StreamResponse:
        """Do to an answer what a fault says."""
        if fault.what == "status":
            page = _page(fault.status, "trouble")
            if fault.retry_after is not None:
                page.headers["Retry-After"] = fault.retry_after
            return page
        if fault.what == "code":
            # a server in trouble repeats what it was asked
            described = f"unspecified error at {request.path_qs}"
            body = xml.document(xml.error(fault.code, described, old_form=self.options.old_errors))
            return _xml(body, 200 if self.options.errors_with_200 else _STATUSES.get(fault.code, 400))
        if fault.what == "stall":
            await asyncio.sleep(fault.seconds)
            return _xml(answer, 200)
        if fault.what == "truncate":
            return _xml(answer[: len(answer) // 2], 200)
        if fault.what == "odd":
            return _xml(b"<maintenance>back soon</maintenance>", 200)
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=500)

    def _commit_late(self, seconds: float, work: Work, call: Call, line: Line) -> None:
        async def commit() -> None:
            await asyncio.sleep(seconds)
            work(call)
            line.effect = True

        task = asyncio.create_task(commit())
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    def end_late(self) -> None:
        """Let nothing more be committed late."""
        for task in self._late:
            task.cancel()

    # --- who asks ---

    def now_ms(self) -> int:
        """Return the server's time in ms since 1970."""
        return int((time.time() + self.options.clock_offset_seconds) * 1000)

    def _check(self, call: Call) -> None:
        """Check key, time and signature, as the API does for all but epoch_time."""
        if call.method == "epoch_time":
            call.need("akid")
            if call.params["akid"] != self.options.key_id:
                raise ApiError(4506, "Invalid akid")
            return
        akid, expires, signature = call.need("akid", "expires", "sig")
        if akid != self.options.key_id:
            raise ApiError(4506, "Invalid akid")
        if not re.fullmatch(r"\d+", expires) or abs(int(expires) - self.now_ms()) > WINDOW_MS:
            raise ApiError(4504, "The expires parameter is too old")
        message = f"{akid}{call.method}{expires}".encode()
        right = base64.b64encode(hmac.new(self.options.password.encode(), message, hashlib.sha512).digest())
        if not hmac.compare_digest(right, signature.encode()):
            raise ApiError(4520, f"The supplied signature parameter was invalid: sig={signature}")

    def _user(self, call: Call) -> User:
        [uid] = call.need("uid")
        user = self.notebooks.users.get(uid)
        if user is None:
            raise ApiError(4533, "The session has timed out, the user must log in again")
        return user

    def _notebook(self, call: Call) -> str:
        user = self._user(call)
        [notebook] = call.need("nbid")
        if notebook not in self.notebooks.names:
            raise ApiError(4529, "The nbid parameter is invalid")
        if notebook not in user.notebooks:
            raise ApiError(4501, "The user has no permission")
        return notebook

    # --- users and notebooks ---

    def _epoch_time(self, call: Call) -> ET.Element:
        now = xml.element("epoch-time", text=str(self.now_ms()), kind="integer")
        return xml.element("utilities", now, xml.echo(call.params))

    def _user_access_info(self, call: Call) -> ET.Element:
        login, password = call.need("login_or_email", "password")
        for user in self.notebooks.users.values():
            if (user.login, user.token) == (login, password):
                return xml.users(user, self.notebooks.names, xml.echo(call.params))
        raise ApiError(4514, "The supplied login or password was incorrect")

    def _user_info(self, call: Call) -> ET.Element:
        return xml.users(self._user(call), self.notebooks.names, xml.echo(call.params))

    def _max_file_size(self, call: Call) -> ET.Element:
        self._user(call)
        size = xml.element("max-file-size", text=str(self.options.max_file_size), kind="integer")
        return xml.element("users", xml.echo(call.params), size)

    def _notebook_info(self, call: Call) -> ET.Element:
        notebook = self._notebook(call)
        name = xml.element("name", text=self.notebooks.names[notebook])
        found = xml.element("notebook", xml.element("id", text=notebook), name)
        return xml.element("notebooks", found, xml.echo(call.params))

    # --- the tree ---

    def _get_tree_level(self, call: Call) -> ET.Element:
        notebook = self._notebook(call)
        [parent] = call.need("parent_tree_id")
        return xml.level(self.notebooks.children(notebook, parent), xml.echo(call.params))

    def _insert_node(self, call: Call) -> ET.Element:
        notebook = self._notebook(call)
        parent, name, is_folder = call.need("parent_tree_id", "display_text", "is_folder")
        made = self.notebooks.insert(notebook, parent, name, is_folder=is_folder.lower() == "true")
        return xml.made_node(made, xml.echo(call.params))

    def _update_node(self, call: Call) -> ET.Element:
        notebook = self._notebook(call)
        node: Node = self.notebooks.node(notebook, *call.need("tree_id"))
        node.name = call.params.get("display_text", node.name)
        node.parent = call.params.get("parent_tree_id", node.parent)
        return xml.made_node(node, xml.echo(call.params))

    # --- entries ---

    def _get_entries(self, call: Call) -> ET.Element:
        notebook = self._notebook(call)
        page = self.notebooks.page(notebook, *call.need("page_tree_id"))
        found = self.notebooks.on_page(page.id)
        return xml.entries(found, xml.echo(call.params), with_data=call.wants_data, root="tree-tools")

    def _page_of(self, call: Call) -> str | None:
        """Return the page that an entry goes to; without notebook and page it is the user's inbox."""
        if "nbid" not in call.params and "pid" not in call.params:
            self._user(call)
            return None
        return self.notebooks.page(self._notebook(call), *call.need("pid")).id

    def _add_entry(self, call: Call) -> ET.Element:
        page = self._page_of(call)
        part_type, data = call.need("part_type", "entry_data")
        made = StoredEntry(opaque("EntryPart"), call.params["uid"], page, part_type, data)
        return self._told(call, self.notebooks.add(made))

    def _update_entry(self, call: Call) -> ET.Element:
        self._user(call)
        eid, data = call.need("eid", "entry_data")
        entry = self._entry(eid)
        entry.data, entry.version = data, entry.version + 1
        return self._told(call, entry)

    def _add_attachment(self, call: Call) -> ET.Element:
        page = self._page_of(call)
        [name] = call.need("filename")
        made = StoredEntry(
            opaque("EntryPart"), call.params["uid"], page, "Attachment", file_name=name, content=call.body,
            caption=call.params.get("caption", ""), content_type=call.content_type,
            change_description=call.params.get("change_description", ""),
        )  # fmt: skip
        return self._told(call, self.notebooks.add(made))

    def _update_attachment(self, call: Call) -> ET.Element:
        self._user(call)
        self._entry(*call.need("eid"))
        raise ApiError(4999, "unspecified error")  # so the real one answers, too

    def _entry_info(self, call: Call) -> ET.Element:
        self._user(call)
        return self._told(call, self._entry(*call.need("eid")), with_data=call.wants_data)

    def _entry_attachment(self, call: Call) -> bytes:
        self._user(call)
        entry = self._entry(*call.need("eid"))
        if entry.content is None:
            raise NotFoundError(entry.id)
        return f"/storage/{base64.urlsafe_b64encode(entry.id.encode()).decode()}".encode()

    def _entry(self, eid: str) -> StoredEntry:
        try:
            return self.notebooks.entries[eid]
        except KeyError:
            raise NotFoundError(eid) from None

    @staticmethod
    def _told(call: Call, entry: StoredEntry, *, with_data: bool = False) -> ET.Element:
        return xml.entries([entry], xml.echo(call.params), with_data=with_data, root="entries")

    async def storage(self, request: web.Request) -> web.Response:
        """Give the bytes of an attachment, where entry_attachment redirects to."""
        eid = base64.urlsafe_b64decode(request.match_info["id"]).decode()
        content = self._entry(eid).content
        return web.Response(body=content, headers={"Content-Type": "application/octet-stream"})


def _xml(body: bytes, status: int) -> web.Response:
    return web.Response(status=status, body=body, headers={"Content-Type": "text/xml"})


def _page(status: int, said: str) -> web.Response:
    return web.Response(status=status, text=_HTML.format(status=status, said=said), content_type="text/html")
