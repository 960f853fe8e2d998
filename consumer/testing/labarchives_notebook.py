"""What a LabArchives server keeps, for tests of plugins only: notebooks, folders, pages, entries, an inbox.

Names may be given twice, ids say nothing, and children come in another order each time, as at the real one.
"""

import base64
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

ROOT = "0"


@dataclass
class Node:
    """A folder or a page."""

    id: str
    notebook: str
    parent: str
    name: str
    is_folder: bool


@dataclass
class StoredEntry:
    """An entry of a page; ``page`` is None in a user's inbox."""

    id: str
    uid: str
    page: str | None
    part_type: str
    data: str = ""
    caption: str = ""
    file_name: str = ""
    content: bytes | None = None
    content_type: str = ""
    change_description: str = ""
    version: int = 1
    created: datetime = field(default_factory=lambda: datetime.now(UTC))

    def described(self) -> dict[str, Any]:
        """Return the entry for the control interface, with its content as text or in Latin-1."""
        return {
            "id": self.id,
            "uid": self.uid,
            "page": self.page,
            "part_type": self.part_type,
            "data": self.data,
            "caption": self.caption,
            "file_name": self.file_name,
            "content": None if self.content is None else self.content.decode("latin-1"),
            "content_type": self.content_type,
            "version": self.version,
        }


@dataclass(frozen=True)
class User:
    """Somebody with a uid, and the notebooks that are shared with that person."""

    uid: str
    login: str
    token: str
    notebooks: tuple[str, ...]


class NotFoundError(Exception):
    """An id that is none of this notebook's."""


class Notebooks:
    """All state of the server."""

    def __init__(self, names: dict[str, str], users: list[User]) -> None:
        self.names = names
        self.users = {user.uid: user for user in users}
        self.nodes: dict[str, Node] = {}
        self.entries: dict[str, StoredEntry] = {}

    def node(self, notebook: str, node_id: str) -> Node:
        """Return a folder or page of a notebook."""
        found = self.nodes.get(node_id)
        if found is None or found.notebook != notebook:
            raise NotFoundError(node_id)
        return found

    def page(self, notebook: str, page_id: str) -> Node:
        """Return a page of a notebook."""
        found = self.node(notebook, page_id)
        if found.is_folder:
            raise NotFoundError(page_id)
        return found

    def children(self, notebook: str, parent: str) -> list[Node]:
        """Return what lies in a folder, in no order that could be relied on."""
        if parent != ROOT and not self.node(notebook, parent).is_folder:
            raise NotFoundError(parent)
        found = [n for n in self.nodes.values() if n.notebook == notebook and n.parent == parent]
        secrets.SystemRandom().shuffle(found)
        return found

    def insert(self, notebook: str, parent: str, name: str, *, is_folder: bool) -> Node:
        """Add a folder or page, whether or not there is one of that name."""
        if parent != ROOT and not self.node(notebook, parent).is_folder:
            raise NotFoundError(parent)
        made = Node(opaque("TreeNode"), notebook, parent, name, is_folder)
        self.nodes[made.id] = made
        return made

    def on_page(self, page: str) -> list[StoredEntry]:
        """Return the entries of a page, oldest first."""
        return [entry for entry in self.entries.values() if entry.page == page]

    def add(self, entry: StoredEntry) -> StoredEntry:
        """Keep an entry."""
        self.entries[entry.id] = entry
        return entry

    def described(self) -> dict[str, Any]:
        """Return everything for the control interface."""
        nodes = [vars(node) for node in self.nodes.values()]
        return {"nodes": nodes, "entries": [entry.described() for entry in self.entries.values()]}


def opaque(kind: str) -> str:
    """Make an id like the real ones: base64 with equals signs, of something that is nobody's business."""
    number = secrets.randbelow(10**9)
    text = f"{number % 97}.6|{number % 61}/{number % 67}/{kind}/{number}|{number % 89}.6"
    text += "|" * ((1 - len(text)) % 3)  # so that there is always an equals sign to encode
    return base64.b64encode(text.encode()).decode()
