"""The requests that eLabFTW's API v2 gets from us (5.3 to 6.x), and what its refusals mean.

It answers a create with an empty body and an address built from its own settings, so only the id in it is used. A
refused request says why in ``message`` or in ``description``, by version, and perhaps in another language.
"""

import asyncio
import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import httpx

from consumer.destinations.contract import request_turn
from consumer.destinations.elabftw_entry import location_id, said
from consumer.destinations.elabftw_rules import File, search
from consumer.destinations.http import HttpClient
from consumer.errors import DestinationError, Misconfigured, Permanent, Transient, UnknownOutcome

EXPERIMENTS = "api/v2/experiments"
#: Copies with one key are few; more than these are not looked at.
MAX_HITS = 50

#: A 400 that holds this code is a 422 to 5.4 and later.
_NOT_NORMAL = 422


class Api:
    """Speaks the API; ``base_url`` is for messages."""

    def __init__(self, http: HttpClient, base_url: str) -> None:
        self._http = http
        self._base_url = base_url

    async def value(self, path: str, params: Mapping[str, str | int] | None = None) -> Any:
        """Return what is at a path below the API. Raises ``Misconfigured`` for a key or address that is wrong."""
        answer = await self._request("GET", f"api/v2/{path}", params=params)
        if answer.status_code != HTTPStatus.OK:
            raise self._no_access(answer) or self._not_there(answer)
        return self._http.json_of(answer)

    async def items(self, path: str, params: Mapping[str, str | int] | None = None) -> list[dict[str, Any]]:
        """Return the objects of a list at a path below the API."""
        value = await self.value(path, params)
        if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
            raise Transient(f"eLabFTW answered no list at {path}", code="no_answer")
        return value

    async def find(self, key: str) -> list[dict[str, Any]]:
        """Return all entries with a record key, whatever became of them, oldest first."""
        return await self.items("experiments", search(key, MAX_HITS))

    async def entry(self, record_id: str) -> dict[str, Any] | None:
        """Return an entry; None when there is none (any more)."""
        answer = await self._request("GET", f"{EXPERIMENTS}/{record_id}")
        if answer.status_code == HTTPStatus.NOT_FOUND and said(answer.content)[0]:
            return None
        if answer.status_code == HTTPStatus.FORBIDDEN:
            message = f"NX_ELABFTW_API_KEY may not read experiment {record_id}: {self.text(answer)}"
            raise Permanent(message, code="not_permitted")
        if answer.status_code != HTTPStatus.OK:
            raise self._no_access(answer) or self._not_there(answer)
        return self._entry_in(answer)

    async def create(self, body: Mapping[str, Any]) -> str:
        """Create an entry and return its id."""
        answer = await self._request("POST", EXPERIMENTS, json=dict(body), creates=True)
        if answer.status_code != HTTPStatus.CREATED:
            raise self._not_created(answer)
        record_id = location_id(answer.headers.get("Location", ""), answer.content)
        if record_id is None:
            raise UnknownOutcome(f"eLabFTW created an experiment and did not say which: {self._http.quote(answer)}")
        return record_id

    async def patch(self, record_id: str, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Change an entry, one key after the other, and return it as it is then."""
        path = f"{EXPERIMENTS}/{record_id}"
        answer = await self._request("PATCH", path, json=dict(changes), creates=True)
        self._written(answer, f"a change of experiment {record_id}", HTTPStatus.OK)
        return self._entry_in(answer, creates=True)

    async def add_tag(self, record_id: str, text: str) -> None:
        """Add a tag; it is there once, however often it is added."""
        path = f"{EXPERIMENTS}/{record_id}/tags"
        answer = await self._request("POST", path, json={"tag": text}, creates=True)
        self._written(answer, f"the tag {text!r} of experiment {record_id}")

    async def attach(self, record_id: str, file: File, replaces: str | None = None) -> None:
        """Attach a file, which is read anew; one that is replaced becomes archived."""
        content = await asyncio.to_thread(file.path.read_bytes)
        path, data = f"{EXPERIMENTS}/{record_id}/uploads", {"comment": file.comment}
        if replaces is not None:
            # without the word the server would only add one more file
            path, data = f"{path}/{replaces}", {**data, "action": "replace"}
        kind = "text/xml" if file.name.lower().endswith(".xml") else "application/octet-stream"
        files = {"file": (file.name, content, kind)}
        answer = await self._request("POST", path, data=data, files=files, creates=True)
        self._written(answer, f"the file {file.name} of experiment {record_id}")

    async def _request(self, method: str, path: str, **parts: Any) -> httpx.Response:
        await request_turn.get()()
        return await self._http.request(method, path, **parts)

    def text(self, answer: httpx.Response) -> str:
        """Return what an answer says, without secrets and on one line."""
        shown = self._http.quote(answer)
        return said(shown.encode())[0] or shown

    def _written(self, answer: httpx.Response, what: str, wanted: HTTPStatus = HTTPStatus.CREATED) -> httpx.Response:
        """Return an answer that says that something was written, else raise."""
        if answer.status_code == wanted:
            return answer
        raise self._no_access(answer) or self._refusal(answer, what)

    def _entry_in(self, answer: httpx.Response, *, creates: bool = False) -> dict[str, Any]:
        """Return the entry in an answer to a read, or to a change."""
        value = self._http.json_of(answer, creates=creates)
        if isinstance(value, dict) and "id" in value:
            return value
        message = f"eLabFTW answered no experiment: {self._http.quote(answer)}"
        raise UnknownOutcome(message) if creates else Transient(message, code="no_answer")

    def _no_access(self, answer: httpx.Response) -> DestinationError | None:
        """Say what a person has to mend about the key, if it is that."""
        text = self.text(answer)
        if answer.status_code == HTTPStatus.UNAUTHORIZED:
            return Misconfigured(
                f"eLabFTW authentication failed ({text}): put a valid API key of eLabFTW into NX_ELABFTW_API_KEY"
            )
        if answer.status_code == HTTPStatus.BAD_REQUEST and "read-only key" in text:
            return Misconfigured(
                "NX_ELABFTW_API_KEY is a read-only key: make one with read/write permission in eLabFTW's settings "
                f"({text})"
            )
        return None

    def _not_there(self, answer: httpx.Response) -> DestinationError:
        where = f"{answer.status_code} at {answer.request.url.path}: {self.text(answer)}"
        return Misconfigured(f"eLabFTW does not answer as it should, check NX_ELABFTW_URL ({where})")

    def _not_created(self, answer: httpx.Response) -> DestinationError:
        """Say why there can be no entry."""
        status, text = answer.status_code, self.text(answer)
        if found := self._no_access(answer):
            return found
        if status == HTTPStatus.BAD_REQUEST and re.search(r"\btemplates?\b", text, re.IGNORECASE):
            return Misconfigured(
                f"the eLabFTW team of NX_ELABFTW_API_KEY forces experiments to be made from a template ({text}): "
                "an administrator of the team has to turn that off, or give the key of a user in another team"
            )
        if status == HTTPStatus.FORBIDDEN:
            return Misconfigured(
                f"NX_ELABFTW_API_KEY may not create experiments in its team ({text}): an administrator of the team "
                "has to allow it"
            )
        if status in {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED}:
            return self._not_there(answer)
        return self._refusal(answer, "the experiment")

    def _refusal(self, answer: httpx.Response, what: str) -> DestinationError:
        status, text = answer.status_code, self.text(answer)
        code = said(answer.content)[1]
        if status < HTTPStatus.BAD_REQUEST:  # a page of something in between: nobody knows what became of it
            return UnknownOutcome(f"eLabFTW answered {status} to {what}, which is no answer of its own: {text}")
        message = f"eLabFTW refused {what}: {status} {text}"
        too_large = status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
        if too_large or (status == HTTPStatus.BAD_REQUEST and "too big" in text):
            return Permanent(message, code="too_large")
        if status == _NOT_NORMAL or (status == HTTPStatus.BAD_REQUEST and code == _NOT_NORMAL):
            return Permanent(message, code="archived")
        if status == HTTPStatus.NOT_FOUND:
            return Permanent(message, code="deleted")
        return Permanent(message, code="not_permitted" if status == HTTPStatus.FORBIDDEN else "rejected")
