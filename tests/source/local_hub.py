"""A server on loopback that speaks as much of the hub's protocol as downloads and uploads need."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
EXTRA = {"pytorch_model.bin": b"old", "onnx/model.safetensors": b"another", "README.md": b"# a model"}
CARD = {"license": "apache-2.0", "tags": ["multimodal"], "base_model": "owner/older"}


class Hub(ThreadingHTTPServer):
    """Serves a checkpoint as owner/model; owner/gated and owner/other exist, but give no files and no weights.

    contents: owner/model's files. repos: those that were made by uploads, with their files; heads: their commits.
    stored: what was uploaded ahead of a commit, by hash. asked: files that were downloaded. calls: what uploads did.
    refused: of these calls, which fail, and with what status.
    """

    daemon_threads = True

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents = {file.name: file.read_bytes() for file in checkpoint.iterdir()} | EXTRA
        self.repos: dict[str, dict[str, bytes]] = {}
        self.heads: dict[str, str] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.calls: Counter[str] = Counter()
        self.refused: dict[str, int] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, repo: str) -> dict[str, bytes] | None:
        return self.contents if repo in ("owner/model", "owner/gated", "owner/other") else self.repos.get(repo)

    def head(self, repo: str) -> str:
        return self.heads.get(repo, COMMIT)

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        self.repos[repo] = files
        self.heads[repo] = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        return self.heads[repo]


class Handler(BaseHTTPRequestHandler):
    """The calls of a download: the commit of a revision, its files, and a file; and those of an upload."""

    server: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def send(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def tell(self, content: object) -> None:
        self.send(200, json.dumps(content).encode())

    def refuses(self, call: str) -> bool:
        self.server.calls[call] += 1
        status = self.server.refused.get(call)
        if status is not None:
            self.send(status, b'{"error": "no"}')
        return status is not None

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path == "api/whoami-v2":
            known = self.headers.get("Authorization") == "Bearer hf_secret"
            self.send(200 if known else 401, b'{"type": "user", "name": "owner"}')
            return
        parts = path.removeprefix("api/models/").split("/")
        repo = "/".join(parts[:2])
        files = self.server.files(repo)
        if len(parts) < 4 and not (len(parts) == 2 and path.startswith("api/models/")):  # the library's own questions
            self.send(404, b"")
            return
        self.server.tokens.add(self.headers.get("Authorization"))
        if files is None:
            self.send(404, b"", X_Error_Code="RepoNotFound")
        elif len(parts) == 2:
            self.describe(repo, files)
        elif parts[3] not in ("main", "v1", self.server.head(repo)):
            self.send(404, b"", X_Error_Code="RevisionNotFound")
        elif parts[2] == "revision":
            self.describe(repo, files)
        elif parts[2] == "tree":
            self.tell([self.entry(*item) for item in files.items()])
        elif repo == "owner/gated":
            self.send(403, b"", X_Error_Code="GatedRepo")
        elif "/".join(parts[4:]) not in files:
            self.send(404, b"", X_Error_Code="EntryNotFound")
        else:
            self.give(repo, files, "/".join(parts[4:]))

    do_HEAD = do_GET  # noqa: N815

    def describe(self, repo: str, files: dict[str, bytes]) -> None:
        siblings = [{"rfilename": name} for name in files]
        private = self.server.private.get(repo, False)
        facts = {"id": repo, "sha": self.server.head(repo), "private": private, "siblings": siblings}
        self.tell(facts | {"cardData": CARD, "tags": []})

    def give(self, repo: str, files: dict[str, bytes], name: str) -> None:
        self.server.asked.append(name)
        if self.command == "GET" and self.refuses(f"GET {name}"):
            return
        content = b'{"model_type": "bert"}' if repo == "owner/other" and name == "config.json" else files[name]
        etag = hashlib.sha256(content).hexdigest()
        self.send(200, content, ETag=f'"{etag}"', X_Repo_Commit=self.server.head(repo))

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        call = next((call for call in CALLS if call in path), "")
        if self.headers.get("Authorization") != "Bearer hf_secret":
            self.send(401, b"")
        elif not self.refuses(call):
            repo = path.removeprefix("api/models/").partition(f".git/{call}" if "lfs" in call else f"/{call}")[0]
            CALLS[call](self, repo, body)

    def create(self, repo: str, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        if self.server.files(repo) is not None:
            self.send(409, json.dumps({"url": f"{self.server.address}/{repo}"}).encode())
            return
        self.server.commit(repo, {".gitattributes": b""})
        self.server.private[repo] = asked.get("private") is True or asked.get("visibility") == "private"
        self.tell({"url": f"{self.server.address}/{repo}", "id": repo, "name": repo})

    def validate(self, repo: str, body: bytes) -> None:
        assert json.loads(body)["content"].startswith("---\n")
        self.tell({"errors": [], "warnings": []})

    def choose(self, repo: str, body: bytes) -> None:
        names = [file["path"] for file in json.loads(body)["files"]]
        large = (".safetensors", ".onnx")
        found = [{"path": name, "uploadMode": "lfs" if name.endswith(large) else "regular"} for name in names]
        self.tell({"files": [one | {"shouldIgnore": False} for one in found]})

    def batch(self, repo: str, body: bytes) -> None:
        found = json.loads(body)["objects"]
        for one in found:
            if one["oid"] not in self.server.stored:
                one["actions"] = {"upload": {"href": f"{self.server.address}/store/{one['oid']}"}}
        self.tell({"transfer": "basic", "objects": found})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        if not self.refuses(f"PUT {len(self.server.stored)}"):  # so many have come before
            self.server.stored[oid] = body
            self.send(200, b"")

    def take(self, repo: str, body: bytes) -> None:
        files = dict(self.server.repos[repo])
        for line in body.splitlines():
            key, value = (json.loads(line)[name] for name in ("key", "value"))
            if key == "header":
                assert value["parentCommit"] == self.server.head(repo)
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            else:
                assert key == "deletedFile"
                del files[value["path"]]
        commit = self.server.commit(repo, files)
        self.tell({"success": True, "commitOid": commit, "commitUrl": f"{self.server.address}/{repo}/commit/{commit}"})

    @staticmethod
    def entry(name: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        return entry


CALLS = {
    "repos/create": Handler.create,
    "validate-yaml": Handler.validate,
    "preupload": Handler.choose,
    "info/lfs/objects/batch": Handler.batch,
    "commit": Handler.take,
}


@contextmanager
def local_hub(checkpoint: Path) -> Iterator[Hub]:
    """A hub that lives as long as the block."""
    hub = Hub(checkpoint)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    hub.server_close()
    thread.join()


def run_command(
    folder: Path, command: str, *arguments: str | Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own: huggingface_hub reads its settings once, when it is imported."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    clean |= {"HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"} | variables
    program = f"import sys; from ivc_export import cli; sys.exit(cli.{command}(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=folder, env=clean, capture_output=True, text=True
    )
