"""
A small Hub on the loopback interface, in memory, with the standard library alone.

It answers what `huggingface_hub` asks for `from_pretrained` (with remote code), `load_dataset` (streaming too),
`push_to_hub` of models, tokenizers and data sets, and reading back what was pushed. Clients need, before they import
anything, `HF_ENDPOINT` (`HubServer.endpoint`), `HF_HUB_DISABLE_XET=1`, `HF_TOKEN` (any) and an `HF_HOME` of their own.

    with HubServer() as hub:
        subprocess.run(..., env={**os.environ, **hub.environment})
        hub.files("model", "someone/generator")
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".pth")
USER = "tester"
MAX_BODY = 64 * 2**20
MAX_STORED = 256 * 2**20
PREFIXES = {"model": "", "dataset": "datasets/"}
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Repository:
    kind: str
    name: str
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def sha(self, index: int | None = None) -> str:
        index = len(self.commits) - 1 if index is None else index
        return hashlib.sha1(f"{self.kind}/{self.name}/{index}".encode()).hexdigest()

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """(commit, files) of a branch or a commit, `None` if there is no such revision."""
        if revision == "main":
            return self.sha(), self.files
        for index, files in enumerate(self.commits):
            if self.sha(index) == revision:
                return revision, files
        return None


class HubServer:
    """Context manager; the server lives in a daemon thread and ends with the block."""

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # large files by sha256
        self.requests: list[str] = []  # method and path, for tests that look at what was asked
        self.lock = threading.Lock()

    def __enter__(self) -> "HubServer":
        handler = type("Handler", (HubHandler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(timeout=10)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client process needs, apart from its `HF_HOME`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_loopback",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def create(self, kind: str, name: str) -> Repository:
        with self.lock:
            return self.repositories.setdefault((kind, name), Repository(kind, name))

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        """Path -> content of the newest commit."""
        return dict(self.repositories[kind, name].files)

    def commit(self, repository: Repository, changes: dict[str, bytes | None]) -> str:
        """Add, replace or (with `None`) delete files; a path that ends in / is a folder to delete."""
        with self.lock:
            files = dict(repository.files)
            for path, content in changes.items():
                if content is not None:
                    files[path] = content
                elif path.endswith("/"):
                    files = {name: data for name, data in files.items() if not name.startswith(path)}
                else:
                    files.pop(path, None)
            repository.commits.append(files)
            return repository.sha()


class HubHandler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *_):
        pass

    # --- answers ---------------------------------------------------------------------------------------------------

    def answer(self, status: int, body: bytes = b"", content_type: str = "application/json", **headers: str):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value, status: int = 200):
        self.answer(status, json.dumps(value).encode())

    def missing(self, code: str):
        """404 with the error code by which the client tells what is missing."""
        self.answer(404, json.dumps({"error": code}).encode(), X_Error_Code=code, X_Error_Message=code)

    def body(self) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 <= length <= MAX_BODY:
            raise ValueError(f"a body of {length} bytes")
        return self.rfile.read(length)

    # --- routes ----------------------------------------------------------------------------------------------------

    def route(self):
        split = urlsplit(self.path)
        path, self.query = unquote(split.path), parse_qs(split.query)
        method = "GET" if self.command == "HEAD" else self.command
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for verb, pattern, action in ROUTES:
                match = re.fullmatch(pattern, path)
                if verb == method and match:
                    return action(self, **match.groupdict())
            self.missing("EntryNotFound")
        except (ValueError, KeyError, TypeError) as error:
            self.close_connection = True
            self.json({"error": f"{type(error).__name__}: {error}"}, 400)

    do_GET = do_HEAD = do_POST = do_PUT = route

    def repository(self, kind: str | None, repo: str) -> Repository | None:
        kind = "dataset" if (kind or "").startswith("datasets") else "model"
        found = self.hub.repositories.get((kind, repo))
        if found is None:
            self.missing("RepoNotFound")
        return found

    def who_am_i(self):
        self.json({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create_repository(self):
        request = json.loads(self.body())
        name = "/".join(filter(None, (request.get("organization") or USER, request["name"])))
        kind = request.get("type") or "model"
        if (kind, name) in self.hub.repositories:
            return self.json({"error": "You already created this repo", "url": f"{self.hub.endpoint}/{name}"}, 409)
        self.hub.create(kind, name)
        self.json({"url": f"{self.hub.endpoint}/{PREFIXES[kind]}{name}", "id": name, "name": name})

    def validate_yaml(self):
        self.body()
        self.json({"errors": [], "warnings": []})

    def info(self, kind: str, repo: str, revision: str = "main"):
        repository = self.repository(kind, repo)
        if repository is None:
            return
        found = repository.at(revision)
        if found is None:
            return self.missing("RevisionNotFound")
        commit, files = found
        self.json(
            {
                "_id": commit[:24],
                "id": repo,
                f"{repository.kind}Id": repo,
                "sha": commit,
                "private": False,
                "gated": False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "lastModified": DATE,
                "createdAt": DATE,
                "siblings": [{"rfilename": path} for path in sorted(files)],
            }
        )

    def entry(self, path: str, content: bytes) -> dict:
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
        if path.endswith(LARGE_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        return entry

    def tree(self, kind: str, repo: str, revision: str, path: str | None = None):
        repository = self.repository(kind, repo)
        if repository is None:
            return
        found = repository.at(revision)
        if found is None:
            return self.missing("RevisionNotFound")
        prefix = f"{path.strip('/')}/" if path and path.strip("/") else ""
        inside = {name: data for name, data in found[1].items() if name.startswith(prefix)}
        if prefix and not inside:
            return self.missing("EntryNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        entries, folders = [], set()
        for name, content in sorted(inside.items()):
            parts = name[len(prefix) :].split("/")
            folders |= {prefix + "/".join(parts[:depth]) for depth in range(1, len(parts))[: None if recursive else 1]}
            if recursive or len(parts) == 1:
                entries.append(self.entry(name, content))
        entries += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        self.json(entries)

    def paths_info(self, kind: str, repo: str, revision: str):
        repository = self.repository(kind, repo)
        if repository is None:
            return
        body = self.body().decode()
        is_json = "json" in (self.headers.get("Content-Type") or "")
        paths = json.loads(body)["paths"] if is_json else parse_qs(body).get("paths", [])
        found = repository.at(revision)
        if found is None:
            return self.missing("RevisionNotFound")
        self.json([self.entry(path, found[1][path]) for path in paths if path in found[1]])

    def refs(self, kind: str, repo: str):
        repository = self.repository(kind, repo)
        if repository is not None:
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.sha()}
            self.json({"branches": [branch], "converts": [], "tags": [], "pullRequests": []})

    def resolve(self, repo: str, revision: str, path: str, kind: str | None = None):
        repository = self.repository(kind, repo)
        if repository is None:
            return
        found = repository.at(revision)
        if found is None:
            return self.missing("RevisionNotFound")
        commit, files = found
        if path not in files:
            return self.missing("EntryNotFound")
        content = files[path]
        large = path.endswith(LARGE_SUFFIXES)
        digest = hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content)
        headers = {"ETag": f'"{digest.hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest.hexdigest()}"'}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        status = 200
        if wanted and any(wanted.groups()):
            first, last = wanted.groups()
            start = int(first) if first else max(len(content) - int(last), 0)
            end = min(int(last), len(content) - 1) if first and last else len(content) - 1
            if start > end:
                return self.answer(416, Content_Range=f"bytes */{len(content)}")
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content, status = content[start : end + 1], 206
        self.answer(status, content, "application/octet-stream", **headers)

    # --- pushing ---------------------------------------------------------------------------------------------------

    def preupload(self, kind: str, repo: str, revision: str):
        if self.repository(kind, repo) is None:
            return
        files = json.loads(self.body())["files"]
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE_SUFFIXES) else "regular",
                "shouldIgnore": False,
            }
            for file in files
        ]
        self.json({"files": modes})

    def large_batch(self, repo: str, kind: str | None = None):
        if self.repository(kind, repo) is None:
            return
        objects = []
        for requested in json.loads(self.body())["objects"]:
            actions = {"upload": {"href": f"{self.hub.endpoint}/objects/{requested['oid']}", "header": {}}}
            known = requested["oid"] in self.hub.objects
            objects.append({**requested, **({} if known else {"actions": actions})})
        self.answer(
            200,
            json.dumps({"transfer": "basic", "objects": objects}).encode(),
            "application/vnd.git-lfs+json",
        )

    def put_object(self, oid: str):
        content = self.body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise ValueError(f"object {oid} has another sha256")
        if sum(map(len, self.hub.objects.values())) + len(content) > MAX_STORED:
            raise ValueError("the store is full")
        self.hub.objects[oid] = content
        self.json({})

    def make_commit(self, kind: str, repo: str, revision: str):
        repository = self.repository(kind, repo)
        if repository is None:
            return
        if revision != "main":
            return self.missing("RevisionNotFound")
        changes: dict[str, bytes | None] = {}
        for line in self.body().splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            if key == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                changes[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                changes[value["path"]] = None
            elif key == "deletedFolder":
                changes[value["path"].rstrip("/") + "/"] = None
            elif key != "header":
                raise ValueError(f"unknown operation {key!r}")
        commit = self.hub.commit(repository, changes)
        url = f"{self.hub.endpoint}/{PREFIXES[repository.kind]}{repo}/commit/{commit}"
        self.json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
FILES = r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", r"/api/whoami-v2", HubHandler.who_am_i),
    ("POST", r"/api/repos/create", HubHandler.create_repository),
    ("POST", r"/api/validate-yaml", HubHandler.validate_yaml),
    ("GET", API, HubHandler.info),
    ("GET", rf"{API}/revision/(?P<revision>[^/]+)", HubHandler.info),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", HubHandler.tree),
    ("GET", rf"{API}/refs", HubHandler.refs),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", HubHandler.paths_info),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", HubHandler.preupload),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", HubHandler.make_commit),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", HubHandler.large_batch),
    ("PUT", r"/objects/(?P<oid>[0-9a-f]{64})", HubHandler.put_object),
    ("GET", rf"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", HubHandler.resolve),
]
