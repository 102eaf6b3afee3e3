"""Loopback servers in threads: a remote text encoder and a minimal Hub, with faults, recording all requests."""

import base64
import hashlib
import io
import json
import os
import threading
import time
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPLY_LIMIT = 30  # seconds after which a hanging server gives up, should a test forget to release it


@dataclass(frozen=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    query: str
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def token(self) -> str | None:
        """The bearer token, or None without one."""
        return self.headers.get("authorization", "").removeprefix("Bearer ") or None

    def json(self) -> dict:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """What goes back; `cut` announces the whole body, sends half of it and closes the connection.

    `more` are pieces sent behind the body, one by one, when a header says that they come.
    """

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    more: Iterable[bytes] = ()


def json_reply(content: object, status: int = 200, **headers: str) -> Reply:
    """A reply with JSON in it; underscores in header names stand for hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, json.dumps(content).encode(), {"Content-Type": "application/json", **named})


class Handler(BaseHTTPRequestHandler):
    """Reads a request, has the owner answer it, sends the reply."""

    def handle_request(self) -> None:
        """One request of any method."""
        owner = self.server.owner
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, urllib.parse.unquote(path), query, headers, self.read_body())
        owner.requests.append(request)
        reply = owner.answer(request)
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(reply.body[: len(reply.body) // 2] if reply.cut else reply.body)
        for piece in reply.more:
            self.wfile.write(piece)

    do_GET = do_HEAD = do_POST = do_PUT = do_CONNECT = handle_request

    def read_body(self) -> bytes:
        """The request's body, of known length or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def log_message(self, *_: object) -> None:
        """Says nothing."""


class QuietServer(ThreadingHTTPServer):
    """A server that keeps silent about clients which hang up."""

    def handle_error(self, *_: object) -> None:
        """Says nothing."""


class Loopback:
    """A server on a free port of this machine; a plain one answers everything with 404."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        """`host` must be an address of this machine."""
        self.requests: list[Request] = []
        self.released = threading.Event()
        self.server = QuietServer((host, 0), Handler)
        self.server.owner = self
        self.server.daemon_threads = True
        self.url = f"http://{host}:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self):
        """Starts to listen."""
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Lets hanging replies go and closes the port."""
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def answer(self, request: Request) -> Reply:
        """The reply to one request."""
        return json_reply({"error": "nothing here"}, 404)


# ---------------------------------------------------------------------------------------------------------------------
# Remote text encoder
# ---------------------------------------------------------------------------------------------------------------------


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        """`folder` must not be there."""
        self.folder = folder

    def __reduce__(self) -> tuple:
        """What a careless loader would run."""
        return os.mkdir, (str(self.folder),)


def saved(content: object, **options: bool) -> bytes:
    """The bytes that torch.save writes."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def deflated(body: bytes) -> bytes:
    """The same zip archive with its files compressed: a thousandth, if they are zeros."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return buffer.getvalue()


class RemoteEncoder(Loopback):
    """Speaks `POST /predict {"prompt": ...}` -> a saved tensor (1, length, width) that depends on the prompt only.

    `fault` names what goes wrong with the next `times` requests; None is nothing.
    """

    def __init__(self, width: int = 96, length: int = 512, host: str = "127.0.0.1") -> None:
        """`width` is the transformer's joint_attention_dim, `length` the number of text tokens."""
        super().__init__(host)
        self.width, self.length = width, length
        self.fault: str | None = None
        self.times = 10**6
        self.bomb_folder: Path | None = None  # what the pickle bomb makes if it goes off
        self.redirect_to = ""
        self.retry_after = ""  # what a busy or paused server asks for
        self.sent = 0  # bytes of an endless answer
        self.predict_url = f"{self.url}/predict"

    @property
    def prompts(self) -> list[str]:
        """The prompts asked for, in order, repeats included."""
        return [request.json()["prompt"] for request in self.requests]

    def embedding(self, prompt: str):
        """The tensor (1, length, width) of a prompt."""
        import torch

        generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
        return torch.randn(1, self.length, self.width, generator=generator)

    def answer(self, request: Request) -> Reply:
        """The tensor, or the fault."""
        if request.method != "POST" or request.path != "/predict":
            return json_reply({"error": "use POST /predict"}, 404)
        good = self.embedding(request.json()["prompt"])
        if self.fault is None or self.times <= 0:
            return Reply(200, saved(good), {"Content-Type": "application/octet-stream"})
        self.times -= 1
        return self.faulty(self.fault, good)

    def pieces(self, piece: bytes, pause: float) -> Iterator[bytes]:
        """The same piece again and again, until the test is over or 1 GB is sent."""
        started = time.monotonic()
        while self.sent < 10**9 and time.monotonic() - started < REPLY_LIMIT and not self.released.wait(pause):
            yield piece
            self.sent += len(piece)

    def faulty(self, fault: str, good) -> Reply:
        """The reply of a server that is broken in the given way."""
        if fault == "hang":
            self.released.wait(REPLY_LIMIT)
        wish = {"Retry-After": self.retry_after} if self.retry_after else {}
        replies = {
            "503": lambda: Reply(503, b"Space is paused", wish),
            "429": lambda: Reply(429, b"slow down", wish or {"Retry-After": "3"}),
            "404": lambda: Reply(404, b"no such endpoint"),
            "hang": lambda: Reply(504),
            "cut": lambda: Reply(200, saved(good), cut=True),
            "text": lambda: Reply(200, b"<html>the Space is building</html>", {"Content-Type": "text/html"}),
            "shape": lambda: Reply(200, saved(good[:, : self.length // 2])),
            "width": lambda: Reply(200, saved(good[:, :, :-1].contiguous())),
            "list": lambda: Reply(200, saved([good])),
            "integers": lambda: Reply(200, saved(good.long())),
            "nan": lambda: Reply(200, saved(good.clone().index_fill_(1, good.new_tensor([3]).long(), float("nan")))),
            "complex": lambda: Reply(200, saved(good.cfloat())),
            "overflow": lambda: Reply(200, saved(good.double() * 1e300)),
            "huge": lambda: Reply(200, bytes(16 * self.length * self.width + 4_000_000)),
            "endless": lambda: Reply(200, headers={"Content-Length": str(10**12)}, more=self.pieces(bytes(65536), 0)),
            "drip": lambda: Reply(200, headers={"Content-Length": str(10**6)}, more=self.pieces(b"x", 0.02)),
            "packed": lambda: Reply(200, deflated(saved(good.new_zeros(1, 100 * self.length, self.width)))),
            "legacy": lambda: Reply(200, saved(good, _use_new_zipfile_serialization=False)),
            "bomb": lambda: Reply(200, saved(Bomb(self.bomb_folder))),
            "redirect": lambda: Reply(307, b"", {"Location": self.redirect_to}),
        }
        return replies[fault]()


# ---------------------------------------------------------------------------------------------------------------------
# Hub
# ---------------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(Loopback):
    """As much of the Hub as creating a repository, one commit and downloading a model ask for.

    `fault` is None, "create" (403), "lfs", "commit" or "weights" (500), or "hang" (no answer to what is posted). What
    was committed lies in `files`, what was asked in `requests`.
    """

    def __init__(self) -> None:
        """Empty: no repository, no model."""
        super().__init__()
        self.fault: str | None = None
        self.created: list[dict] = []  # bodies of create requests
        self.files: dict[str, bytes] = {}  # committed, by path in the repository
        self.commits: list[str] = []  # repositories committed to
        self.blobs: dict[str, bytes] = {}  # uploaded as LFS, by sha256
        self.models: dict[str, Path] = {}  # served for download, by repository id
        self.gated: set[str] = set()

    @property
    def downloads(self) -> list[str]:
        """Files fetched, without their repository."""
        return [r.path.split("/resolve/")[1].split("/", 1)[1] for r in self.requests if self.is_download(r)]

    @staticmethod
    def is_download(request: Request) -> bool:
        """Whether a request fetches the content of a file."""
        return request.method == "GET" and "/resolve/" in request.path

    def answer(self, request: Request) -> Reply:
        """Finds the route by the shape of the path."""
        path = request.path
        if self.fault == "hang" and request.method == "POST":
            self.released.wait(REPLY_LIMIT)
        routes = (
            (path == "/api/repos/create", self.create),
            (path == "/api/validate-yaml", lambda _: json_reply({"errors": [], "warnings": []})),
            (path == "/api/whoami-v2", lambda _: json_reply({"name": "tester", "type": "user", "orgs": []})),
            ("/preupload/" in path, self.preupload),
            (path.endswith(".git/info/lfs/objects/batch"), self.batch),
            (path.startswith("/lfs/"), self.receive),
            ("/commit/" in path, self.commit),
            ("/tree/" in path, self.tree),
            ("/resolve/" in path, self.resolve),
            (path.startswith("/api/models/"), self.info),
        )
        found = next((route for matches, route in routes if matches), None)
        return found(request) if found else super().answer(request)

    def create(self, request: Request) -> Reply:
        """Makes a repository in the name of the token's owner."""
        if self.fault == "create":
            return json_reply({"error": "You don't have the rights to create a model under this namespace"}, 403)
        self.created.append(request.json())
        name = f"{request.json()['organization'] or 'tester'}/{request.json()['name']}"
        return json_reply({"url": f"{self.url}/{name}", "name": name, "id": "1"})

    def preupload(self, request: Request) -> Reply:
        """Weights and images go through LFS, text into the commit itself."""
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in request.json()["files"]
        ]
        return json_reply({"files": files})

    def batch(self, request: Request) -> Reply:
        """Says where each LFS object is to be put."""
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}"}}}
            for item in request.json()["objects"]
        ]
        return json_reply({"transfer": "basic", "objects": objects})

    def receive(self, request: Request) -> Reply:
        """Takes one LFS object; its name is its hash."""
        if self.fault == "lfs":
            return json_reply({"error": "Internal error"}, 500)
        self.blobs[request.path.rpartition("/")[2]] = request.body
        return Reply()

    def commit(self, request: Request) -> Reply:
        """Takes the commit: one JSON object per line."""
        if self.fault == "commit":
            return json_reply({"error": "Internal error"}, 500)
        for line in request.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                assert value["encoding"] == "base64"
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
        repository = request.path.removeprefix("/api/models/").partition("/commit/")[0]
        self.commits.append(repository)
        return json_reply({"commitUrl": f"{self.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT})

    def refuse(self, repository: str) -> Reply | None:
        """The Hub's refusal of an unknown or gated repository."""
        if repository in self.gated:
            return json_reply({"error": "gated"}, 403, X_Error_Code="GatedRepo", X_Error_Message="accept the licence")
        if repository not in self.models:
            return json_reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        return None

    def info(self, request: Request) -> Reply:
        """Commit and files of a model."""
        repository = request.path.removeprefix("/api/models/").partition("/revision/")[0]
        siblings = [{"rfilename": name} for name in self.listing(repository)] if repository in self.models else []
        return self.refuse(repository) or json_reply({"id": repository, "sha": COMMIT, "siblings": siblings})

    def listing(self, repository: str) -> list[str]:
        """Paths of a model's files."""
        folder = self.models[repository]
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def tree(self, request: Request) -> Reply:
        """Sizes and names of a model's files."""
        repository = request.path.removeprefix("/api/models/").partition("/tree/")[0]
        refusal = self.refuse(repository)
        if refusal:
            return refusal
        folder = self.models[repository]
        files = [(name, (folder / name).read_bytes()) for name in self.listing(repository)]
        return json_reply(
            [{"type": "file", "path": name, "size": len(data), "oid": git_oid(data)} for name, data in files]
        )

    def resolve(self, request: Request) -> Reply:
        """One file of a model."""
        repository, _, rest = request.path.removeprefix("/").partition("/resolve/")
        refusal = self.refuse(repository)
        path = None if refusal else self.models[repository] / rest.partition("/")[2]
        if refusal or not path.is_file():
            return refusal or json_reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        if self.fault == "weights" and path.suffix == ".safetensors":
            return json_reply({"error": "Internal error"}, 500)
        data = path.read_bytes()
        return Reply(200, data, {"ETag": f'"{git_oid(data)}"', "X-Repo-Commit": COMMIT})


def git_oid(data: bytes) -> str:
    """The name git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def point_to(monkeypatch: pytest.MonkeyPatch, hub: Loopback, cache: Path, token: str | None = None) -> None:
    """Makes the huggingface_hub of this process talk to `hub`, keep downloads in `cache` and find `token`."""
    import huggingface_hub

    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)  # behind functions such as create_repo
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("NO_PROXY", "*")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN", raising=False)
