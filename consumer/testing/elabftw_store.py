"""What eLabFTW's test server knows and how it changes, in one of its versions. For tests of plugins only.

There are three versions, 5.3.6, 5.6.12 and 6.0.0, and others behave as the last of these before them. Nothing is
kept when the process ends.
"""

import hashlib
import json
import re
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from consumer.testing.elabftw_accounts import ACCOUNTS, USERS, Account, Refused, Settings
from consumer.testing.elabftw_html import purified

NORMAL, ARCHIVED, DELETED = 1, 2, 3
HTML = 1
MAX_BODY_BYTES = 4_120_000
MAX_TITLE = 255
#: From here on the server gives no digest of a file.
NO_HASH_BYTES = 100_000_000

_TEAM_BASE, _OWNER_BASE = 30, 10
_TEXTS = ("title", "date", "body", "metadata", "canread", "canwrite")
_NUMBERS = ("category", "status", "custom_id", "rating", "content_type", "state", "hide_main_text")
_BASES = ("canread_base", "canwrite_base")


@dataclass(slots=True)
class Notebook:
    """All experiments with their attachments; methods are what a request does, and raise ``Refused``."""

    settings: Settings = field(default_factory=Settings)
    experiments: dict[int, dict[str, Any]] = field(default_factory=dict)
    uploads: dict[int, dict[str, Any]] = field(default_factory=dict)
    contents: dict[int, bytes] = field(default_factory=dict)
    tags: dict[str, int] = field(default_factory=dict)

    # --- experiments -------------------------------------------------------------------------------------------

    def create(self, account: Account, body: dict[str, Any]) -> int:
        """Make an experiment; with tags that are refused it is there all the same."""
        if self.settings.create_forbidden:
            raise Refused(403, "Experiments cannot be created by users of this team.")
        template = body.get("template")
        if self.settings.force_template and template is None:
            raise Refused(400, "Experiments must use a template!")
        if template is not None:
            body = {"title": body.get("title")}
        entry = self._new(account, body)
        self.experiments[entry["id"]] = entry
        tags = body.get("tags") or []
        for text in [tags] if isinstance(tags, str) else tags:
            self.add_tag(account, entry, str(text))
        return int(entry["id"])

    def _new(self, account: Account, body: dict[str, Any]) -> dict[str, Any]:
        kind = HTML if not self.settings.use_markdown else 2
        if self.settings.number >= (5, 4) and "content_type" in body:
            kind = int(body["content_type"])
        category = _positive(body.get("category"))
        number = max(self.experiments, default=0) + 1
        now = _now()
        return {
            "id": number,
            "title": _title(body.get("title")),
            "date": now[:10],
            "body": self._body(body.get("body"), kind),
            "content_type": kind,
            "category": category,
            "status": _positive(body.get("status")),
            "custom_id": self._next_custom_id(category),
            "elabid": f"{now[:10].replace('-', '')}-{secrets.token_hex(20)}",
            "metadata": self._metadata(body.get("metadata")),
            "tags": [],
            "state": NORMAL,
            "locked": 0,
            "lockedby": None,
            "userid": account.userid,
            "team": account.team,
            "created_at": now,
            "modified_at": now,
            "canread": _access(body.get("canread")),
            "canwrite": _access(body.get("canwrite")),
            "canread_base": int(body.get("canread_base") or _TEAM_BASE),
            "canwrite_base": int(body.get("canwrite_base") or _OWNER_BASE),
            "rating": 0,
            "hide_main_text": 0,
            "created_from_id": None,
            "edited_by": None,
        }

    def duplicate(self, account: Account, number: int) -> int:
        """Copy an experiment as a person does; fields that ask for it lose their value."""
        source = self.readable(account, number)
        body = {name: source[name] for name in ("body", "content_type", "category", "status")}
        entry = self._new(account, {**body, "title": f"{source['title']} I"})
        metadata = json.loads(source["metadata"] or "null")
        fields = metadata.get("extra_fields") if isinstance(metadata, dict) else None
        for item in (fields or {}).values():
            if item.get("blank_value_on_duplicate"):
                item["value"] = ""
        entry["metadata"] = None if metadata is None else json.dumps(metadata)
        entry["tags"] = list(source["tags"])
        if self.settings.number >= (5, 6):
            entry["created_from_id"] = number
        self.experiments[entry["id"]] = entry
        return int(entry["id"])

    def patch(self, account: Account, number: int, body: dict[str, Any]) -> None:
        """Change an experiment key by key; what came before a refused key is written."""
        entry = self.readable(account, number)
        if "action" in body:
            self._act(account, entry, body)
            return
        if entry["edited_by"] not in {None, account.userid}:
            raise Refused(400, f"This entry is being edited by {self.fullname(entry['edited_by'])}.")
        self.writable(account, entry)
        for name, value in body.items():
            self._set(entry, name, value)
            entry["modified_at"] = _now()

    def _set(self, entry: dict[str, Any], name: str, value: Any) -> None:
        text = "Array" if isinstance(value, dict | list) else "" if value is None else str(value)
        if name == "bodyappend":
            entry["body"] = self._body((entry["body"] or "") + text, entry["content_type"])
        elif name == "body":
            entry["body"] = self._body(text, entry["content_type"])
        elif name == "title":
            entry["title"] = _title(text)
        elif name == "metadata" or (name == "metadatamerge" and self.settings.number >= (6, 0)):
            entry["metadata"] = _merged(entry["metadata"], _json(text), merge=name != "metadata")
        elif name in _TEXTS:
            entry[name] = text
        elif name == "custom_id":
            self._claim_custom_id(entry, _positive(text))
        elif name in _NUMBERS or name in _BASES:
            entry[name] = _positive(text) if name in {"category", "status"} else int(text or 0)
        else:
            raise Refused(400, "Invalid update target.")

    def _act(self, account: Account, entry: dict[str, Any], body: dict[str, Any]) -> None:
        action = body["action"]
        if action in {"lock", "forcelock", "forceunlock"}:
            self._may_write(account, entry)
            entry["locked"] = 0 if action == "forceunlock" or (entry["locked"] and action == "lock") else 1
            entry["lockedby"] = account.userid if entry["locked"] else None
        elif action in {"archive", "unarchive"}:
            self.writable(account, entry, states=(NORMAL, ARCHIVED))
            entry["state"] = ARCHIVED if action == "archive" else NORMAL
        elif action == "restore":
            self._may_write(account, entry)
            entry["state"] = NORMAL
        elif action == "exclusiveeditmode":
            entry["edited_by"] = None if entry["edited_by"] else account.userid
        elif action == "destroy":
            self.delete(account, entry["id"])
        elif action == "updateowner" and self.settings.number >= (6, 0):
            self._hand_over(account, entry, body)
        elif action == "updatemetadatafield":
            self._set_fields(account, entry, {name: body[name] for name in body if name != "action"})
        else:
            raise Refused(400, "Invalid action.")

    def _hand_over(self, account: Account, entry: dict[str, Any], body: dict[str, Any]) -> None:
        self.writable(account, entry)
        team, userid = body.get("team"), body.get("userid")
        if team is None or userid not in {other.userid for other in ACCOUNTS if other.team == team}:
            raise Refused(400, "The new owner must belong to the team.")
        entry["userid"] = userid

    def _set_fields(self, account: Account, entry: dict[str, Any], values: dict[str, Any]) -> None:
        self.writable(account, entry)
        metadata = json.loads(entry["metadata"] or "{}")
        for name, value in values.items():
            if name not in metadata.get("extra_fields", {}):
                raise Refused(400, f"The field {name} does not exist.")
            metadata["extra_fields"][name]["value"] = value
        entry["metadata"] = json.dumps(metadata)

    def delete(self, account: Account, number: int) -> None:
        """Delete softly: the experiment can still be read."""
        entry = self.readable(account, number)
        self.writable(account, entry, states=(NORMAL, ARCHIVED, DELETED))
        entry.update(state=DELETED, custom_id=None)
        for upload in self.uploads.values():
            if upload["item_id"] == number:
                upload["state"] = DELETED

    def add_tag(self, account: Account, entry: dict[str, Any], text: str) -> int:
        """Add a tag; the collation knows no case."""
        text = re.sub(r"[|\\]", " ", text).strip()
        if not text:
            raise Refused(400, "Input is too short! (minimum: 1)")
        self.writable(account, entry)
        known = next((tag for tag in self.tags if tag.casefold() == text.casefold()), None)
        if known is None and self.settings.tags_forbidden and not account.admin:
            raise Refused(400, "Users cannot create tags.")
        number = self.tags.setdefault(known or text, len(self.tags) + 1)
        if (known or text) not in entry["tags"]:
            entry["tags"].append(known or text)
        return number

    # --- attachments -------------------------------------------------------------------------------------------

    def attach(
        self, account: Account, number: int, name: str, content: bytes, *, comment: str, replaces: int = 0
    ) -> int:
        """Attach a file; the one that it replaces becomes archived."""
        entry = self.readable(account, number)
        self.writable(account, entry)
        if name.lower().endswith(".php"):
            raise Refused(400, "PHP files are forbidden!")
        if replaces:
            self.upload(number, replaces)["state"] = ARCHIVED
        upload = max(self.uploads, default=0) + 1
        large = len(content) >= NO_HASH_BYTES
        self.uploads[upload] = {
            "id": upload,
            "real_name": name,
            "long_name": f"{secrets.token_hex(2)}/{secrets.token_hex(32)}.bin",
            "comment": comment or None,
            "item_id": number,
            "userid": account.userid,
            "type": "experiments",
            "created_at": _now(),
            "hash": None if large else hashlib.sha256(content).hexdigest(),
            "hash_algorithm": None if large else "sha256",
            "storage": 1,
            "filesize": len(content),
            "state": NORMAL,
            "immutable": 0,
            "fullname": self.fullname(account.userid),
        }
        self.contents[upload] = content
        return upload

    def upload(self, number: int, upload: int) -> dict[str, Any]:
        """Return an attachment of an experiment."""
        found = self.uploads.get(upload)
        if found is None or found["item_id"] != number:
            raise Refused(404, "Nothing to show with this id")
        return found

    # --- who may what ------------------------------------------------------------------------------------------

    def readable(self, account: Account, number: int) -> dict[str, Any]:
        """Return an experiment that the account may read, deleted or not."""
        entry = self.experiments.get(number)
        if entry is None:
            raise Refused(404, "Nothing to show with this id")
        if not self.may_read(account, entry):
            raise Refused(403, "Sorry, you are not allowed to perform that action.")
        return entry

    def may_read(self, account: Account, entry: dict[str, Any]) -> bool:
        """Tell whether an account may read an experiment."""
        in_team = account.team == entry["team"] and entry["canread_base"] >= _TEAM_BASE
        named = account.userid in {entry["userid"], *_listed(entry["canread"]), *_listed(entry["canwrite"])}
        return in_team or named or (account.admin and account.team == entry["team"])

    def writable(self, account: Account, entry: dict[str, Any], states: tuple[int, ...] = (NORMAL,)) -> None:
        """Refuse what may not be written: by right, by lock, by state."""
        self._may_write(account, entry)
        if entry["locked"]:
            raise Refused(403, "This item is locked. You cannot edit it!")
        if entry["state"] not in states:
            text = "This entry is archived or deleted, it cannot be edited."
            raise Refused(422 if self.settings.number < (5, 4) else 400, text, 422)

    def _may_write(self, account: Account, entry: dict[str, Any]) -> None:
        named = account.userid in {entry["userid"], *_listed(entry["canwrite"])}
        in_team = account.team == entry["team"] and (account.admin or entry["canwrite_base"] >= _TEAM_BASE)
        if not named and not in_team:
            raise Refused(403, "Sorry, you are not allowed to perform that action.")

    def users(self, account: Account) -> list[dict[str, Any]]:
        """Return the users of all teams; only administrators see internal ids."""
        hidden = () if account.admin else ("orgid",)
        found = [{**user, "fullname": self.fullname(user["userid"])} for user in USERS]
        return [{name: value for name, value in user.items() if name not in hidden} for user in found]

    def fullname(self, userid: Any) -> str:
        """Return a user's name."""
        return next(f"{user['firstname']} {user['lastname']}" for user in USERS if user["userid"] == userid)

    # --- values ------------------------------------------------------------------------------------------------

    def _body(self, value: Any, kind: int) -> str | None:
        text = "" if value is None else str(value)
        if len(text.encode()) > MAX_BODY_BYTES:
            raise Refused(400, "Content is too big! Cannot save!")
        if kind == HTML:
            text = purified(text).replace(self.settings.purified_word or "\0", "")
        return text or None

    def _metadata(self, value: Any) -> str | None:
        if value is None:
            return None
        if isinstance(value, str) and self.settings.number >= (6, 0):
            return _json(value)
        return json.dumps(value)

    def _next_custom_id(self, category: int | None) -> int | None:
        if category is None:
            return None
        taken = [entry["custom_id"] for entry in self.experiments.values() if entry["category"] == category]
        return max((number for number in taken if number), default=-1) + 1 or None

    def _claim_custom_id(self, entry: dict[str, Any], wanted: int | None) -> None:
        others = [other for other in self.experiments.values() if other is not entry]
        if wanted and any((o["category"], o["custom_id"]) == (entry["category"], wanted) for o in others):
            raise Refused(400, "Custom ID is already used! Try another one.")
        entry["custom_id"] = wanted


def _title(value: Any) -> str:
    text = re.sub(r"[\r\n]+", " ", "" if value is None else str(value)).strip()
    return text[:MAX_TITLE] or "Untitled"


def _positive(value: Any) -> int | None:
    try:
        number = int(value)
    except (TypeError, ValueError):
        return None
    return number if number > 0 else None


def _json(text: str) -> str:
    try:
        json.loads(text)
    except ValueError:
        message = "SQLSTATE[22032]: Invalid JSON text: 3140 Invalid JSON text in argument to column 'metadata'."
        raise Refused(500, message, 3140) from None
    return text


def _merged(old: str | None, new: str, *, merge: bool) -> str:
    return json.dumps({**json.loads(old or "{}"), **json.loads(new)}) if merge else new


def _access(value: Any) -> str:
    return str(value) if value else json.dumps({"teams": [], "users": [], "teamgroups": []})


def _listed(access: str) -> list[int]:
    try:
        return [int(user) for user in json.loads(access)["users"]]
    except (ValueError, KeyError, TypeError):
        return []


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S")
