"""The XML that LabArchives answers with, for tests of plugins only.

The real one fixes no order of elements, writes empty ones as ``nil``, and names no charset in its header.
"""

import secrets
from collections.abc import Iterable, Mapping
from xml.etree import ElementTree as ET

from consumer.testing.labarchives_notebook import Node, StoredEntry, User

_random = secrets.SystemRandom()


def element(tag: str, *children: ET.Element, text: str | None = None, kind: str | None = None) -> ET.Element:
    """Build one element; ``kind`` is its type attribute."""
    made = ET.Element(tag, {"type": kind} if kind else {})
    made.text = text
    if text == "":
        made.set("nil", "true")
    made.extend(children)
    return made


def document(root: ET.Element) -> bytes:
    """Write a document."""
    return bytes(ET.tostring(root, encoding="UTF-8", xml_declaration=True))


def echo(params: Mapping[str, str]) -> ET.Element:
    """Repeat the request, as each answer does."""
    return element("request", *(element(name.replace("_", "-"), text=text) for name, text in params.items()))


def error(code: int, description: str, *, old_form: bool) -> ET.Element:
    """Build an error answer, in its current or its old form."""
    if old_form:
        return element("error", element("code", text=str(code)), element("msg", text=description))
    return element(
        "error",
        element("error-code", text=str(code), kind="integer"),
        element("error-description", text=description),
    )


def level(nodes: Iterable[Node], request: ET.Element) -> ET.Element:
    """Build the answer of get_tree_level."""
    listed = element("level-nodes", *(_node("level-node", node) for node in nodes), kind="array")
    return _shuffled("tree-tools", listed, request)


def made_node(node: Node, request: ET.Element) -> ET.Element:
    """Build the answer of insert_node and update_node."""
    return _shuffled("tree-tools", _node("node", node), request)


def entries(found: Iterable[StoredEntry], request: ET.Element, *, with_data: bool, root: str) -> ET.Element:
    """Build an answer with entries."""
    listed = [_entry(entry, with_data=with_data) for entry in found]
    if root == "entries":
        return element("entries", *listed, request)
    return element(root, element("entries", *listed, kind="array"), request)


def users(user: User, names: Mapping[str, str], request: ET.Element) -> ET.Element:
    """Build the answer about a user."""
    notebooks = [
        _shuffled(
            "notebook",
            element("id", text=notebook),
            element("name", text=names[notebook]),
            element("is-default", text="true" if index == 0 else "false", kind="boolean"),
        )
        for index, notebook in enumerate(user.notebooks)
    ]
    return element(
        "users",
        element("id", text=user.uid),
        element("fullname", text=user.login),
        element("auto-login-allowed", text="false", kind="boolean"),
        request,
        element("notebooks", *notebooks, kind="array"),
    )


def _node(tag: str, node: Node) -> ET.Element:
    access = element(
        "user-access", *(element(name, text="true", kind="boolean") for name in ("can-read", "can-write"))
    )
    return _shuffled(
        tag,
        element("is-page", text="false" if node.is_folder else "true", kind="boolean"),
        element("tree-id", text=node.id),
        element("display-text", text=node.name),
        access,
    )


def _entry(entry: StoredEntry, *, with_data: bool) -> ET.Element:
    moment = entry.created.strftime("%Y-%m-%dT%H:%M:%SZ")
    parts = [
        element("eid", text=entry.id),
        element("created-at", text=moment, kind="datetime"),
        element("updated-at", text=moment, kind="datetime"),
        element("part-type", text=entry.part_type),
        element("version", text=str(entry.version), kind="integer"),
        element("change-description", text=entry.change_description),
        element("attach-file-name", text=entry.file_name),
        element("caption", text=entry.caption),
    ]
    if entry.content is not None:
        parts.append(element("attach-file-size", text=str(len(entry.content)), kind="integer"))
        parts.append(element("attach-content-type", text=entry.content_type))
    if with_data:
        parts.append(element("entry-data", text=entry.data))
    return _shuffled("entry", *parts)


def _shuffled(tag: str, *children: ET.Element) -> ET.Element:
    mixed = list(children)
    _random.shuffle(mixed)
    return element(tag, *mixed)
