"""``new-destination``: a small destination that works, a server to try it with, and the test that proves it."""

import keyword
import re
from pathlib import Path

from consumer.commands import console

_NAME = re.compile(r"[a-z][a-z0-9_]{0,99}")

DESTINATION = '''\
"""Brings each record to a CLASS as one item, found again by its record key."""

from hashlib import sha256

import nexus_export as nx
from consumer.destinations.http import BaseUrl, HttpClient, TlsSettings
from pydantic import Field, SecretStr


class CLASS:
    name, priority, settle_seconds = "NAME", 50, 60  # the last: how late the server may store what we gave up

    class Settings(TlsSettings):
        url: BaseUrl | None = Field(None, description="address of the service; without it nothing goes there")
        token: SecretStr = Field(SecretStr(""), description="API token")

    def __init__(self, settings):
        self.url, self.enabled = f"{settings.url}items", settings.url is not None
        headers = {"Authorization": f"Token {settings.token.get_secret_value()}"}
        self.http = HttpClient(settings.url or "", settings, setting="NX_UPPER_URL", headers=headers)
        self.aclose = self.http.aclose

    async def validate_config(self):
        return await self.find("no such key") == [], None  # what it raises is shown as the reason

    async def export(self, context):
        method, path, action, file = "POST", "items", "created", context.xml_file_path
        for number, digest in (await self.find(context.record_key))[:1]:
            method, path, action = "PUT", f"items/{number}", "updated"
            if digest == context.record_sha256:
                return nx.ExportResult(True, self.name, number, f"{self.url}/{number}", action="unchanged")
            if digest not in context.sent_hashes:  # never write over what a person changed
                raise nx.Permanent(f"item {number} was changed there", code="changed_at_destination")
        body = {"key": context.record_key, "title": file.stem, "content": file.read_bytes().decode()}
        answer = await self.ask(method, path, json=body, creates=True)
        number = str(answer["id"])  # without one this raises, and after a request that means: unknown outcome
        return nx.ExportResult(True, self.name, number, f"{self.url}/{number}", action=action)

    async def verify(self, context):
        items = await self.find(context.record_key)
        ours = [number for number, digest in items if digest == context.record_sha256]
        if ours:
            return nx.Present(ours[0], f"{self.url}/{ours[0]}", surplus=tuple(ours[1:]))
        return nx.Partial(items[0][0]) if items else nx.Absent()

    async def find(self, key):
        items = await self.ask("GET", "items", params={"key": key})
        if not isinstance(items, list):  # an answer that we do not understand is not "nothing there"
            raise nx.Transient("a list of items was expected", code="no_answer")
        return [(str(item["id"]), sha256(item["content"].encode()).hexdigest()) for item in items]

    async def ask(self, method, path, *, creates=False, **parts):
        answer = await self.http.request(method, path, creates=creates, **parts)
        if answer.is_success:
            return self.http.json_of(answer, creates=creates)
        refusal = nx.Permanent if creates and answer.status_code not in {401, 403} else nx.Misconfigured
        raise refusal(f"{method} was refused with {answer.status_code}: {self.http.quote(answer)}")
'''

SERVER = '''\
"""A CLASS to try the destination with: like the real ones it never notices that it stores a thing twice."""

import itertools
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

ITEMS, NUMBERS = {}, itertools.count(1)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        parts = urlsplit(self.path)
        found = [item for item in list(ITEMS.values()) if [item["key"]] == parse_qs(parts.query).get("key")]
        self.answer(200, len(found) if parts.path == "/count" else found)

    def do_POST(self):
        item = {"id": next(NUMBERS), **json.loads(self.rfile.read(int(self.headers["Content-Length"])))}
        ITEMS[item["id"]] = item
        self.answer(201, item)

    def do_PUT(self):
        number = int(self.path.rpartition("/")[2])
        ITEMS[number] |= json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(200, ITEMS[number])

    def answer(self, status, value):
        if self.headers["Authorization"] != "Token a-secret-token" and "/count" not in self.path:
            status, value = 401, "unknown token"
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128


if __name__ == "__main__":
    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
'''

TEST = '''\
"""Proves NAME.py with the conformance kit."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_the_conformance_kit_passes():
    command = [sys.executable, "-m", "consumer", "conformance", "NAME.py:CLASS"]
    command += ["--server", f"{sys.executable} NAME_server.py {{port}}"]
    command += ["--count-url", "http://127.0.0.1:{port}/count?key={key}"]
    environment = os.environ | {"NX_UPPER_TOKEN": "a-secret-token"}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
'''


def files_of(name: str) -> dict[str, str]:
    """Return the files of a new destination by name. Raises ``ValueError`` for a name that does not do."""
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ValueError(f"{name!r} must be lower-case letters, digits and _ (at most 100), starting with a letter")
    kind = "".join(part.capitalize() for part in name.split("_"))
    words = (("UPPER", name.upper()), ("NAME", name), ("CLASS", kind))
    texts = {f"{name}.py": DESTINATION, f"{name}_server.py": SERVER, f"test_{name}.py": TEST}
    for old, new in words:
        texts = {file: text.replace(old, new) for file, text in texts.items()}
    return texts


def write_destination(name: str, folder: Path) -> int:
    """Write the files; returns 1 when one of them is there already."""
    texts = files_of(name)
    for file in texts:
        if (folder / file).exists():
            console.complain(f"{folder / file} is there already; nothing was written")
            return 1
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")
        console.say(f"wrote {folder / file}")
    kind = next(line.split()[1].rstrip(":") for line in texts[f"{name}.py"].splitlines() if line.startswith("class "))
    console.say(f"prove it:  NX_{name.upper()}_TOKEN=a-secret-token nexus-export conformance {name}.py:{kind} \\")
    console.say(f"             --server 'python {name}_server.py {{port}}' \\")
    console.say("             --count-url 'http://127.0.0.1:{port}/count?key={key}'")
    console.say("use it:    NX_DESTINATIONS_PATH=this folder")
    return 0
