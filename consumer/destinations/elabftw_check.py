"""What can be wrong with the settings of eLabFTW though it takes the key; each answer says what to change."""

from consumer.destinations.elabftw_api import Api
from consumer.destinations.elabftw_entry import as_object
from consumer.destinations.elabftw_people import version_of
from consumer.errors import DestinationError

#: Older ones lose metadata, or fail on it.
OLDEST_VERSION = (5, 3)


async def find_problem(api: Api, key: str, category: int | None, status: int | None) -> str | None:
    """Ask for version, rights, category and status; None if all is well. Raises what the API raises."""
    version = version_of(as_object(await api.value("info")))
    if (0, 0) < version < OLDEST_VERSION:
        return f"eLabFTW {version[0]}.{version[1]} is too old: update it to 5.3 or later"
    if await _is_read_only(api, key):
        return "NX_ELABFTW_API_KEY is a read-only key: make one with read/write permission in eLabFTW's settings"
    for setting, path, wanted in (
        ("NX_ELABFTW_EXPERIMENT_CATEGORY", "experiments_categories", category),
        ("NX_ELABFTW_EXPERIMENT_STATUS", "experiments_status", status),
    ):
        if wanted is None:
            continue
        there = {item.get("id"): item.get("title") for item in await api.items(f"teams/current/{path}")}
        if wanted not in there:
            known = ", ".join(f"{number} ({title})" for number, title in there.items()) or "none"
            return f"{setting} is {wanted}, but the key's team has only: {known}; set it to one of these"
    return await _forced_template(api)


async def _is_read_only(api: Api, key: str) -> bool:
    """Tell whether the key surely cannot write; only older keys say which one of the list they are."""
    try:
        keys = await api.items("apikeys")
    except DestinationError:
        return False
    number = key.partition("-")[0] if "-" in key else ""
    named = [item for item in keys if str(item.get("id")) == number]
    return bool(keys) and not any(item.get("can_write") for item in named or keys)


async def _forced_template(api: Api) -> str | None:
    try:
        team = as_object(await api.value("teams/current"))
    except DestinationError:
        return None
    if str(team.get("force_exp_tpl")) != "1":
        return None
    return (
        "the eLabFTW team of NX_ELABFTW_API_KEY forces experiments to be made from a template: an administrator of "
        "the team has to turn that off, or give the key of a user in another team"
    )
