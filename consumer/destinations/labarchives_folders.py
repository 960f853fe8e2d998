"""The folders of a LabArchives notebook: found, made, and where a page is looked for."""

import asyncio
from collections.abc import Sequence

from consumer.destinations.labarchives_client import ROOT, LabArchivesClient
from consumer.destinations.labarchives_rules import DELETED_FOLDER, ROOT_FOLDER, Node, folders_named, plain_name
from consumer.errors import Misconfigured, Permanent


class Folders:
    """Finds and makes the folders of a notebook; which ones there are is kept until it proves wrong.

    Two processes may make one folder at a time. Then both stay, all look into both, and new pages go into the one
    with the lesser id.
    """

    def __init__(self, client: LabArchivesClient, notebook: str) -> None:
        self._client = client
        self._notebook = notebook
        self._lock = asyncio.Lock()
        self._kept: dict[str, list[str]] = {}

    async def content(self, uid: str, instrument: str, month: str, *, renew: bool) -> list[Node]:
        """Return what lies in the folders of an instrument and in those of the month in them.

        ``renew``: the folders themselves are looked up anew, too.
        """
        if renew:
            self._kept.clear()
        was_kept = plain_name(instrument) in self._kept
        try:
            return await self._content(uid, instrument, month)
        except Permanent:
            if not was_kept:
                raise
            self._kept.clear()  # a person may have removed a folder since
            return await self._content(uid, instrument, month)

    async def _content(self, uid: str, instrument: str, month: str) -> list[Node]:
        folders = await self._of_instrument(uid, instrument, make=False)
        nodes = await self._children(uid, folders)
        return nodes + await self._children(uid, folders_named(nodes, month))

    async def place(self, uid: str, instrument: str, month: str | None, *, renew: bool = False) -> str:
        """Return the folder that a new page goes into, made if need be."""
        if renew:
            self._kept.clear()
        folders = await self._of_instrument(uid, instrument, make=True)
        if month is not None:
            async with self._lock:
                folders = await self._named(uid, folders, month, make=True)
        return folders[0]

    async def holds(self, uid: str, folder: str, page: str) -> bool:
        """Tell whether a folder, which may be gone, has a page."""
        try:
            return any(node.id == page for node in await self._children(uid, [folder]))
        except Permanent as error:
            if error.code != "rejected":
                raise
            return False

    async def deleted(self, uid: str) -> list[Node]:
        """Return what lies in the folder that other programs put away what they delete."""
        nodes = await self._children(uid, [ROOT])
        return await self._children(uid, folders_named(nodes, DELETED_FOLDER))

    async def _of_instrument(self, uid: str, instrument: str, *, make: bool) -> list[str]:
        name = plain_name(instrument)
        async with self._lock:
            if not self._kept.get(name):
                top = await self._named(uid, [ROOT], ROOT_FOLDER, make=make)
                self._kept[name] = await self._named(uid, top, name, make=make)
            return self._kept[name]

    async def _named(self, uid: str, parents: Sequence[str], name: str, *, make: bool) -> list[str]:
        """Return the folders with a name, the one to use first; none if there is none and none is to be made."""
        found = folders_named(await self._children(uid, parents), name)
        if found or not make:
            return found
        made = await self._client.insert(uid, self._notebook, parents[0], name, folder=True)
        return folders_named(await self._children(uid, parents), name) or [made]

    async def _children(self, uid: str, parents: Sequence[str]) -> list[Node]:
        found = []
        for parent in parents:
            try:
                found += await self._client.children(uid, self._notebook, parent)
            except Permanent as error:
                if parent != ROOT or error.code != "rejected":
                    raise
                raise Misconfigured(f"{error}; check NX_LABARCHIVES_NOTEBOOK_ID") from None
        return found
