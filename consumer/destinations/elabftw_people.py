"""Whose an entry is: finding the session's user at eLabFTW, and giving rights to an entry."""

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from consumer.destinations.contract import ExportContext
from consumer.destinations.elabftw_api import Api
from consumer.errors import Misconfigured

_SETTING = "NX_ELABFTW_USERS_FILE"
_COLUMNS = 2
#: The first version that hands an entry to another user.
_OWNER_VERSION = 6


def session_names(context: ExportContext) -> tuple[list[str], str | None]:
    """Return the names that the session's user goes by, and the e-mail address."""
    reserved = context.reservation_event
    names = [getattr(reserved, "username", None), context.user]
    email = getattr(reserved, "user_email", None)
    return [name for name in dict.fromkeys(names) if name], email


def read_users(path: Path) -> dict[str, int]:
    """Read which eLabFTW user is whom: CSV lines ``username,userid``, or a JSON object. Raises ``Misconfigured``."""
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("{"):
            pairs = list(json.loads(text).items())
        else:
            pairs = [_pair(row) for row in csv.reader(text.splitlines()) if any(part.strip() for part in row)]
    except OSError as error:
        raise Misconfigured(f"{_SETTING}: {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise Misconfigured(f"{_SETTING}: {path} is neither CSV nor JSON in UTF-8: {error}") from None
    if pairs and not _is_id(pairs[0][1]) and not text.lstrip().startswith("{"):
        del pairs[0]  # the names of the columns
    for name, userid in pairs:
        if not _is_id(userid):
            raise Misconfigured(f"{_SETTING}: {name!r} has {userid!r} instead of the number of an eLabFTW user")
    return {str(name).strip(): int(userid) for name, userid in pairs}


def _pair(row: Sequence[str]) -> tuple[str, str]:
    if len(row) != _COLUMNS:
        raise ValueError(f"the line {','.join(row)!r} is not 'username,userid'")
    return row[0], row[1].strip()


def _is_id(value: Any) -> bool:
    return re.fullmatch(r"[1-9][0-9]{0,9}", str(value)) is not None and not isinstance(value, bool)


def match_user(users: Iterable[Mapping[str, Any]], names: Sequence[str], email: str | None) -> int | None:
    """Return the user with this e-mail address, else with one of these names as address or as internal id."""
    listed = list(users)
    for wanted in (email, *names):
        for user in listed:
            known = [user.get("email")] if wanted == email else [user.get(k) for k in ("email", "orgid", "username")]
            if wanted and wanted.casefold() in {str(value).casefold() for value in known if value}:
                return int(user["userid"])
    return None


def with_user(access: Any, userid: int) -> str:
    """Return who may read or write, as eLabFTW holds it, and this user too."""
    try:
        value = json.loads(access) if isinstance(access, str) else access
    except ValueError:
        value = None
    value = dict(value) if isinstance(value, dict) else {"teams": [], "teamgroups": [], "users": []}
    users = [int(user) for user in value.get("users") or []]
    value["users"] = users if userid in users else [*users, userid]
    return json.dumps(value)


def version_of(info: Mapping[str, Any]) -> tuple[int, int]:
    """Return the version as two numbers; (0, 0) if it is not told."""
    found = re.match(r"(\d+)\.(\d+)", str(info.get("elabftw_version", "")))
    return (int(found[1]), int(found[2])) if found else (0, 0)


async def find_user(api: Api, context: ExportContext, mapping: Mapping[str, int]) -> int | None:
    """Return the eLabFTW user of a session: by the file, by e-mail address, by name."""
    names, email = session_names(context)
    for name in names:
        if name in mapping:
            return mapping[name]
    # only administrators see internal ids, and no search looks at them: so at last in the list of all users
    for query in [{"q": text} for text in dict.fromkeys([email, *names]) if text] + [{}] * bool(names):
        found = match_user(await api.items("users", query), names, email)
        if found is not None:
            return found
    return None


async def hand_over(api: Api, entry: Mapping[str, Any], userid: int) -> None:
    """Make a user the owner, or before version 6 let the user read and write. Raises what the API raises."""
    record_id, service = str(entry["id"]), entry.get("userid")
    if service == userid:
        return
    if version_of(await api.value("info"))[0] < _OWNER_VERSION:
        rights = {right: with_user(entry.get(right), userid) for right in ("canread", "canwrite")}
        await api.patch(record_id, rights)
        return
    # else the service could not write to it any more
    await api.patch(record_id, {"canwrite": with_user(entry.get("canwrite"), int(service or 0))})
    await api.patch(record_id, {"action": "updateowner", "userid": userid, "team": entry.get("team")})
