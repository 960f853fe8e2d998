"""Reads what each destination really holds, by other ways than the consumer's; it shares no code with it.

CDCS is asked over plain HTTP, the notebooks tell their whole state, the archive is read from the disk.
"""

import hashlib
import http.client
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lxml import html

ROOT_FOLDER = "NexusLIMS Records"
_PAGE_NAME = re.compile(r"\d{4}-\d\d-\d\d \N{EM DASH} (?P<session>\S+) \[k:\w+\]")
_NORMAL = 1
_SHA256_LINE = re.compile(r"sha256:([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Held:
    """One live copy: whose it is, what it is called, the sha256 of each of its files, and its links.

    ``summaries`` counts the texts that tell of the session. A copy of no session that is known has what was found
    in its place.
    """

    destination: str
    id: str
    session: str
    title: str
    files: tuple[str, ...]
    summaries: int = 1
    links: tuple[str, ...] = ()


def read_cdcs(port: int, token: str, sessions: Mapping[str, str]) -> Iterator[Held]:
    """Fetch every record of CDCS; ``sessions`` are those of the titles."""
    headers = {"Authorization": f"Token {token}"}

    def get(path: str) -> Any:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            content = answer.read()
        if answer.status != http.client.OK:
            raise RuntimeError(f"CDCS answered {answer.status} to GET {path}: {content[:300]!r}")
        return json.loads(content)

    for listed in get("/rest/admin/data/"):
        record = get(f"/rest/data/{listed['id']}/")
        digest = _sha256(record["xml_content"].encode())
        yield Held("cdcs", str(record["id"]), sessions.get(record["title"], "?"), record["title"], (digest,))


def read_elabftw(state: Mapping[str, Any]) -> Iterator[Held]:
    """Return the live experiments with their live attachments."""
    for entry in state["experiments"]:
        if entry["state"] != _NORMAL:
            continue
        fields = json.loads(entry["metadata"] or "{}").get("extra_fields", {})
        session = fields.get("Session ID", {}).get("value", "?")
        uploads = [u for u in state["uploads"] if u["item_id"] == entry["id"] and u["state"] == _NORMAL]
        body = entry["body"] or ""
        in_field = fields.get("CDCS Record", {}).get("value")
        in_body = links_in(body)
        # the page and the field have to agree
        links = tuple(sorted({in_field} & set(in_body))) if in_field else ()
        files = tuple(sorted(u["hash"] for u in uploads))
        yield Held("elabftw", str(entry["id"]), session, entry["title"], files, body.count(session), links)


def read_labarchives(state: Mapping[str, Any]) -> Iterator[Held]:
    """Return the pages below our folder, with their texts and attachments."""
    nodes = {node["id"]: node for node in state["nodes"]}
    for page in nodes.values():
        if page["is_folder"]:
            continue
        named = _PAGE_NAME.fullmatch(page["name"])
        ours = ROOT_FOLDER in _path(nodes, page)
        session = named["session"] if named and ours else "?"
        entries = [entry for entry in state["entries"] if entry["page"] == page["id"]]
        texts = [entry["data"] for entry in entries if entry["content"] is None]
        contents = [entry["content"].encode("latin-1") for entry in entries if entry["content"] is not None]
        summaries = sum(session in text and _SHA256_LINE.search(text) is not None for text in texts)
        links = tuple(link for text in texts for link in links_in(text))
        files = tuple(sorted(map(_sha256, contents)))
        yield Held("labarchives", page["id"], session, page["name"], files, summaries, links)


def folders_made_twice(state: Mapping[str, Any]) -> int:
    """Count the folders beyond the first of their name and place."""
    places = [(node["parent"], node["name"]) for node in state["nodes"] if node["is_folder"]]
    return len(places) - len(set(places))


def read_archive(root: Path) -> Iterator[Held]:
    """Return every record file, with what its manifest says."""
    for path in sorted(root.rglob("*.xml")):
        manifest_path = path.with_suffix(".json")
        manifest = json.loads(manifest_path.read_bytes()) if manifest_path.exists() else {}
        digest = _sha256(path.read_bytes())
        session = manifest.get("session_identifier", "?") if manifest.get("sha256") == digest else "?"
        yield Held("local_archive", str(path.relative_to(root)), session, path.name, (digest,))


def links_in(text: str) -> list[str]:
    """Return the addresses that a piece of HTML links to."""
    if not text.strip():
        return []
    return [str(url) for url in html.fragment_fromstring(text, create_parent=True).xpath(".//a/@href")]


def by_copy(held: Iterable[Held]) -> dict[tuple[str, str], list[Held]]:
    """Group copies by session and destination."""
    found: dict[tuple[str, str], list[Held]] = {}
    for copy in held:
        found.setdefault((copy.session, copy.destination), []).append(copy)
    return found


def _path(nodes: Mapping[str, Mapping[str, Any]], node: Mapping[str, Any]) -> list[str]:
    """Return the names of the folders that a node lies in."""
    names = []
    while (parent := nodes.get(node["parent"])) is not None:
        names.append(parent["name"])
        node = parent
    return names


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
