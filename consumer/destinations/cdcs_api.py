"""The requests that CDCS is sent, and what its answers to them mean (core_main_app 2.18 to 2.23).

A refused token is 401 or 403 with ``detail``, depending on the server's settings. A missing right is 403 with
``message``, or 500. A refused record is 500 too, like a server in trouble; only the messages tell them apart.
"""

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal
from urllib.parse import quote

import httpx

from consumer.destinations.cdcs_rules import Record, lacks_right, refusal_code, said, stored_record
from consumer.destinations.http import HttpClient, TlsSettings, retry_after_seconds
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient, UnknownOutcome

#: Large records take long: CDCS needs about half a second for each megabyte, times the records in parallel.
READ_SECONDS = 110.0

TEMPLATES = "rest/template-version-manager/global/"

#: What a request is about decides what its refusal means.
About = Literal["lists", "create", "read", "change"]

_INTERNAL = {HTTPStatus.INTERNAL_SERVER_ERROR}
_AUTHENTICATION = {HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN}
_NO_CDCS = {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED}


class CdcsApi:
    """One CDCS, with one token. Raises the errors of destinations, each naming the setting to look at."""

    def __init__(self, base_url: str, token: str, tls: TlsSettings) -> None:
        self.base_url = base_url
        headers = {"Authorization": f"Token {token}", "Accept": "application/json"}
        self._http = HttpClient(base_url, tls, setting="NX_CDCS_URL", headers=headers, read_seconds=READ_SECONDS)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def page(self, record_id: str | int) -> str:
        """Return the address of a record for people."""
        return f"{self.base_url}data?id={record_id}"

    async def problem(self) -> str | None:
        """Return why the list of schemas, which takes a valid token, is not given; nothing when it is."""
        answer = await self._http.request("GET", TEMPLATES, pass_through=range(400, 600))
        status, body = answer.status_code, self._http.quote(answer)
        if status in _AUTHENTICATION:
            return f"CDCS authentication failed: check NX_CDCS_TOKEN ({status}: {body})"
        if status == HTTPStatus.OK:
            return None
        advice = "; check NX_CDCS_URL" if status < HTTPStatus.INTERNAL_SERVER_ERROR else ""
        return f"CDCS answered {status} {answer.reason_phrase} at {self.base_url}{TEMPLATES}{advice}"

    async def templates(self, title: str | None = None) -> list[dict[str, Any]]:
        """List the schemas for everybody, or the one with a title."""
        return self._objects(await self._get(TEMPLATES, params={"title": title} if title else None))

    async def schema(self, version: str) -> bytes | None:
        """Return the XSD of a schema version; nothing when CDCS does not give it to this token."""
        answer = await self._http.request("GET", f"rest/template/{quote(version, safe='')}/download/")
        if answer.status_code == HTTPStatus.OK:
            return answer.content
        refused = self.refused(answer, "read")
        if answer.status_code in _AUTHENTICATION and isinstance(refused, Misconfigured):
            raise refused
        return None

    async def workspaces(self) -> list[dict[str, Any]]:
        """List the workspaces that the token may read."""
        return self._objects(await self._get("rest/workspace/read_access/"))

    async def users(self) -> list[dict[str, Any]]:
        """List all users; takes a superuser's token."""
        return self._objects(await self._get("rest/user/"))

    async def create_user(self, user: Mapping[str, str]) -> str:
        """Create a user and return what CDCS said; two at a time for one user get 400 or 500."""
        any_status = range(400, 600)
        answer = await self._http.request("POST", "rest/user/", json=user, creates=True, pass_through=any_status)
        return self._http.quote(answer)

    async def change_owner(self, record_id: str, user_id: int) -> None:
        """Give a record to another user; takes a superuser's token."""
        answer = await self._patch(f"{_record(record_id)}change-owner/{user_id}")
        if answer.status_code != HTTPStatus.OK:
            raise self.refused(answer, "change")

    async def assign(self, record_id: str, workspace: int) -> bool:
        """Put a record into a workspace; False when one of them is not there."""
        answer = await self._patch(f"{_record(record_id)}assign/{workspace}")
        if answer.status_code == HTTPStatus.NOT_FOUND:
            return False
        if answer.status_code != HTTPStatus.OK:
            raise self.refused(answer, "change")
        return True

    async def create(self, body: Mapping[str, Any]) -> httpx.Response:
        """Send a new record; the answer is the caller's to judge."""
        return await self._http.request("POST", "rest/data/", json=body, creates=True, pass_through=_INTERNAL)

    def created(self, answer: httpx.Response) -> Record:
        """Return the record that an answer to a create tells of."""
        if answer.status_code != HTTPStatus.CREATED:
            raise self.refused(answer, "create")
        record = stored_record(self._http.json_of(answer, creates=True))
        if record is None:
            raise UnknownOutcome(f"CDCS created a record and did not say which: {self._http.quote(answer)}")
        return record

    async def read(self, record_id: str) -> Record | None:
        """Return a record, or nothing when there is none.

        Raises ``Permanent`` (``not_permitted``) when it is there and the token may not read it.
        """
        answer = await self._http.request("GET", _record(record_id), pass_through=_INTERNAL)
        if answer.status_code == HTTPStatus.NOT_FOUND:
            return None
        if answer.status_code != HTTPStatus.OK:
            raise self.refused(answer, "read")
        record = stored_record(self._http.json_of(answer))
        if record is None or record.sha256 is None:
            raise Transient(f"CDCS answered no record: {self._http.quote(answer)}", code="no_answer")
        return record

    async def update(self, record_id: str, content: str) -> bool:
        """Give a record another content; False when there is none."""
        answer = await self._patch(_record(record_id), {"xml_content": content})
        if answer.status_code == HTTPStatus.NOT_FOUND:
            return False
        if answer.status_code != HTTPStatus.OK:
            raise self.refused(answer, "change")
        return True

    async def search(self, title: str, versions: Sequence[str]) -> list[Record] | str:
        """Return all records with a title, or why CDCS does not tell.

        It answers without a token too, then with public records only: prove the token first.
        """
        templates = [{"id": version} for version in versions]
        query = {"query": {}, "title": title, "templates": templates, "all": "true"}
        answer = await self._http.request("POST", "rest/data/query/", json=query, pass_through=_INTERNAL)
        if answer.status_code == HTTPStatus.BAD_REQUEST:  # more than a hundred hits
            return self._http.quote(answer)
        found = [stored_record(item) for item in self._objects(answer)]
        # a filter that CDCS does not know is ignored, so the title is checked here too
        return [record for record in found if record is not None and record.title == title]

    def refused(self, answer: httpx.Response, about: About) -> DestinationError:
        """Say what an answer means that is not success."""
        status, body = answer.status_code, self._http.quote(answer)
        error = said(answer.content)
        message = error.get("message", "")
        if status == HTTPStatus.FORBIDDEN and not lacks_right(error.get("detail", "")) and "detail" in error:
            status = HTTPStatus.UNAUTHORIZED
        if status == HTTPStatus.UNAUTHORIZED:
            return Misconfigured(f"Could not authenticate to CDCS, check NX_CDCS_TOKEN: {body}")
        if status == HTTPStatus.FORBIDDEN or lacks_right(message):
            return self._no_right(answer, about)
        if HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR:
            if about in {"lists", "read"} or (about == "create" and status in _NO_CDCS):
                return Misconfigured(f"CDCS answered {status} to {_where(answer)}, check NX_CDCS_URL: {body}")
            return Permanent(f"CDCS upload failed: {body}", code="rejected")
        wait = retry_after_seconds(answer.headers)
        text = f"CDCS answered {status} {answer.reason_phrase} to {_where(answer)}: {body}"
        if about in {"lists", "read"}:
            return Transient(text, retry_after=wait, code="server_error")
        code = refusal_code(message)
        return Permanent(f"CDCS upload failed: {body}", code=code) if code else UnknownOutcome(text, retry_after=wait)

    def _no_right(self, answer: httpx.Response, about: About) -> DestinationError:
        body = self._http.quote(answer)
        if about == "lists":
            return Misconfigured(f"NX_CDCS_TOKEN has no right to {_where(answer)}: {body}")
        if about == "create":
            return Misconfigured(f"NX_CDCS_TOKEN may not create records: {body}")
        return Permanent(f"NX_CDCS_TOKEN may not {about} this record: {body}", code="not_permitted")

    async def _get(self, path: str, params: Mapping[str, str] | None = None) -> httpx.Response:
        return await self._http.request("GET", path, params=params, pass_through=_INTERNAL)

    async def _patch(self, path: str, body: Mapping[str, str] | None = None) -> httpx.Response:
        answer = await self._http.request("PATCH", path, json=body, creates=True, pass_through=_INTERNAL)
        # a page of something in between may come with 200 too, and then nothing has changed
        if answer.status_code == HTTPStatus.OK and not isinstance(self._http.json_of(answer, creates=True), dict):
            raise UnknownOutcome(f"CDCS answered something unexpected: {self._http.quote(answer)}")
        return answer

    def _objects(self, answer: httpx.Response) -> list[dict[str, Any]]:
        """Return the objects of an answer that should be a list of them."""
        if answer.status_code != HTTPStatus.OK:
            raise self.refused(answer, "lists")
        value = self._http.json_of(answer)
        if not isinstance(value, list) or not all(isinstance(item, dict) and "id" in item for item in value):
            raise Transient(f"CDCS answered something unexpected: {self._http.quote(answer)}", code="no_answer")
        return value


def _record(record_id: str) -> str:
    return f"rest/data/{quote(record_id, safe='')}/"


def _where(answer: httpx.Response) -> str:
    return f"{answer.request.method} {answer.request.url.path}"
