"""Who owns a record at CDCS: the session's user instead of the token's. Takes a superuser's token.

``NX_CDCS_USERS_FILE`` names those whose user name at CDCS is another one than in NexusLIMS: a JSON object, or CSV
lines of the two names.
"""

import csv
import json
import secrets
from pathlib import Path
from typing import Any

from consumer.destinations.cdcs_api import CdcsApi
from consumer.destinations.cdcs_rules import find_user
from consumer.errors import Misconfigured, Permanent

_SETTING = "NX_CDCS_USERS_FILE"


class Owners:
    """Finds or creates the users of CDCS that records are given to."""

    def __init__(self, api: CdcsApi, users_file: Path | None) -> None:
        self._api = api
        self._users_file = users_file.expanduser() if users_file else None

    async def check(self) -> None:
        """Raise ``Misconfigured`` when the token is no superuser's, or the file of users cannot be used."""
        try:
            await self._api.users()
        except Misconfigured as error:
            message = (
                f"NX_CDCS_USER_OWNED_RECORDS needs the token of a superuser, and NX_CDCS_TOKEN is none ({error}); "
                "give another token, or set NX_CDCS_USER_OWNED_RECORDS=false"
            )
            raise Misconfigured(message) from None
        self._names()

    async def hand_over(self, record_id: str, reservation: Any) -> None:
        """Make the user of a reservation the owner of a record. Raises the reason why it stays the token's user's."""
        username = getattr(reservation, "username", None)
        if not username:
            raise Permanent("the session has no reservation with a username; the token's user owns the record")
        await self._api.change_owner(record_id, await self._user_id(username, reservation))

    async def _user_id(self, username: str, reservation: Any) -> int:
        mapped = self._names().get(username)
        email = getattr(reservation, "user_email", None)
        if mapped is not None:
            user_id = find_user(await self._api.users(), mapped, None)
            if user_id is None:
                raise Permanent(f"{_SETTING} says that {username} is {mapped}, whom CDCS does not have")
            return user_id
        user_id = find_user(await self._api.users(), username, email)
        if user_id is not None:
            return user_id
        answer = await self._api.create_user(_new_user(username, reservation))
        # another task may have created the user just before; then this answer is an error
        user_id = find_user(await self._api.users(), username, email)
        if user_id is None:
            raise Permanent(f"CDCS did not create the user {username}: {answer}")
        return user_id

    def _names(self) -> dict[str, str]:
        return read_names(self._users_file) if self._users_file else {}


def read_names(path: Path) -> dict[str, str]:
    """Read the names at CDCS by the names in NexusLIMS; it is read each time, so a change needs no restart.

    Raises ``Misconfigured`` with the line at fault.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise Misconfigured(f"{_SETTING}: {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise Misconfigured(f"{_SETTING}: {path} holds no UTF-8 text") from None
    return _from_json(path, text) if text.lstrip().startswith("{") else _from_csv(path, text)


def _from_json(path: Path, text: str) -> dict[str, str]:
    try:
        names = json.loads(text)
    except ValueError as error:
        raise Misconfigured(f"{_SETTING}: {path} is no JSON: {error}") from None
    for name, at_cdcs in names.items():
        if not isinstance(at_cdcs, str) or not at_cdcs.strip():
            raise Misconfigured(f"{_SETTING}: {path} gives {name!r} no user name at CDCS but {at_cdcs!r}")
    return {name.strip(): at_cdcs.strip() for name, at_cdcs in names.items()}


def _from_csv(path: Path, text: str) -> dict[str, str]:
    names: dict[str, str] = {}
    lines = csv.reader(text.splitlines(), skipinitialspace=True)
    for row in lines:
        cells = [cell.strip() for cell in row]
        if not any(cells) or cells[0].startswith("#"):
            continue
        if len(cells) != 2 or not all(cells):  # noqa: PLR2004 - the two names
            message = f"{path}, line {lines.line_num}: needs a user name of NexusLIMS, a comma, and one of CDCS"
            raise Misconfigured(f"{_SETTING}: {message}")
        names[cells[0]] = cells[1]
    return names


def _new_user(username: str, reservation: Any) -> dict[str, str]:
    return {
        "username": username,
        "email": getattr(reservation, "user_email", None) or "",
        "first_name": getattr(reservation, "user_first_name", None) or "",
        "last_name": getattr(reservation, "user_last_name", None) or "",
        "password": secrets.token_urlsafe(32),  # nobody is told: people sign in another way, or have it reset
    }
