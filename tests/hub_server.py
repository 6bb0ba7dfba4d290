"""What huggingface_hub needs of the Hub to make, fill, look into and download repositories of models, on loopback."""

import base64
import hashlib
import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


TOKEN, USER = "hf_test", "me"


class HubServer(ThreadingHTTPServer):
    """
    A Hub with one user and his token.

    Attributes:
        endpoint: Its address, for `HF_ENDPOINT`.
        repositories: By name, whether each is private and its commits, each of them the contents of files by path.
        objects: Contents of large files by their sha256, whether committed or not.
        sent: How often each large file has arrived whole, by its sha256.
        asked: The query and the message of each commit.
        lost_after: The connection breaks in the upload after so many large files, and stays broken until this is
            `None` again.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.objects, self.sent, self.asked = {}, {}, Counter(), []
        self.lost_after = None
        self.lock = threading.Lock()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> None:
        """A repository that there was before."""
        self.repositories[name] = {"private": private, "commits": [{".gitattributes": b""}]}
        self.commit(name, files)

    def commit(self, name: str, files: dict[str, bytes], deleted: tuple[str, ...] = ()) -> str:
        commits = self.repositories[name]["commits"]
        kept = {path: data for path, data in commits[-1].items() if path not in deleted}
        commits.append(kept | files)
        return self.sha(name)

    def files(self, name: str) -> dict[str, bytes]:
        return self.repositories[name]["commits"][-1]

    def sha(self, name: str) -> str:
        return hashlib.sha1(f"{name} {len(self.repositories[name]['commits'])}".encode()).hexdigest()

    def handle_error(self, request, client_address) -> None:
        pass  # a client that was dropped, or left


@contextmanager
def serve():
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def _is_large(path: str) -> bool:
    return path.endswith(".safetensors")


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, value=None, status: int = 200, headers: dict | None = None, data: bytes | None = None) -> None:
        data = json.dumps(value).encode() if data is None else data
        self.send_response(status)
        common = {"Content-Length": str(len(data)), "X-Request-Id": "Root=1-2345"}
        for name, content in {**common, **(headers or {})}.items():
            self.send_header(name, content)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.answer({"error": message or code}, status, {"X-Error-Code": code, "X-Error-Message": message or code})

    def lose(self) -> None:
        self.close_connection = True
        self.connection.close()

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_request(self) -> None:
        server, path = self.server, unquote(urlsplit(self.path).path).strip("/")
        parts = path.split("/")
        if self.command == "PUT" and parts[0] == "lfs":  # its address is the permission, as that of a storage
            return self.receive(parts[1])
        body = self.body()

        # 1. Who asks
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {TOKEN}"):
            return self.refuse(401, message="Invalid credentials in Authorization header")
        if self.command in ("POST", "PUT") and authorization is None or path == "api/whoami-v2" and not authorization:
            return self.refuse(401, message="Invalid username or password.")
        if path == "api/whoami-v2":
            return self.answer({"name": USER, "type": "user", "orgs": []})
        if path == "api/validate-yaml":  # the metadata of a README.md
            return self.answer({"errors": [], "warnings": []})
        if path == "api/repos/create":
            return self.create(json.loads(body))

        # 2. Which repository
        parts = parts[2:] if parts[:2] == ["api", "models"] else parts
        name = "/".join(parts[:2]).removesuffix(".git")
        repository, what = server.repositories.get(name), parts[2:]
        if repository is None or (repository["private"] and authorization is None):
            return self.refuse(404 if authorization else 401, "RepoNotFound", "Repository not found")
        files, sha = server.files(name), server.sha(name)
        if what[:1] in (["revision"], ["tree"], ["resolve"]) and what[1] not in ("main", sha):
            return self.refuse(404, "RevisionNotFound")

        # 3. What of it
        match what:
            case [] | ["revision", _]:
                siblings = [{"rfilename": path} for path in files]
                self.answer({"id": name, "sha": sha, "private": repository["private"], "siblings": siblings})
            case ["tree", _, *_]:
                self.answer([self.describe(path, data) for path, data in files.items()])
            case ["resolve", _, *path]:
                self.resolve("/".join(path), files, sha)
            case ["preupload", _]:
                known = [file["path"] for file in json.loads(body)["files"]]
                self.answer({"files": [self.preupload(path, files.get(path)) for path in known]})
            case ["info", "lfs", "objects", "batch"]:
                self.answer({"objects": [self.batch(item) for item in json.loads(body)["objects"]]})
            case ["verify"]:
                item = json.loads(body)
                whole = len(server.objects.get(item["oid"], b"")) == item["size"]
                self.answer({}) if whole else self.refuse(404)
            case ["commit", _]:
                self.commit(name, [json.loads(line) for line in body.splitlines()])
            case _:
                self.refuse(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def describe(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": _blob_id(data)}
        if _is_large(path):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        return entry

    def resolve(self, path: str, files: dict[str, bytes], sha: str) -> None:
        headers = {"X-Repo-Commit": sha}
        if path not in files:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.answer({}, 404, headers)
        etag = hashlib.sha256(files[path]).hexdigest() if _is_large(path) else _blob_id(files[path])
        self.answer(headers=headers | {"ETag": f'"{etag}"'}, data=files[path])

    def create(self, wanted: dict) -> None:
        owner = wanted.get("organization") or USER
        name = f"{owner}/{wanted['name']}"
        if owner != USER:
            return self.refuse(403, message=f"You have no rights in {owner}")
        if name in self.server.repositories:
            return self.refuse(409, message="You already created this model repo")
        private = wanted.get("visibility") == "private"
        self.server.repositories[name] = {"private": private, "commits": [{".gitattributes": b""}]}
        self.answer({"url": f"{self.server.endpoint}/{name}"})

    def preupload(self, path: str, data: bytes | None) -> dict:
        mode = "lfs" if _is_large(path) else "regular"
        oid = None if data is None else hashlib.sha256(data).hexdigest() if _is_large(path) else _blob_id(data)
        return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch(self, item: dict) -> dict:
        if item["oid"] in self.server.objects:
            return item
        base = urlsplit(self.path).path.removesuffix(".git/info/lfs/objects/batch")
        upload = {"href": f"{self.server.endpoint}/lfs/{item['oid']}"}
        return item | {"actions": {"upload": upload, "verify": {"href": f"{self.server.endpoint}{base}/verify"}}}

    def receive(self, oid: str) -> None:
        server = self.server
        with server.lock:
            if server.lost_after is not None and server.sent.total() >= server.lost_after:
                self.rfile.read(16)
                return self.lose()
            data = self.body()
            assert hashlib.sha256(data).hexdigest() == oid
            server.objects[oid] = data
            server.sent[oid] += 1
        self.answer(data=b"")

    def commit(self, name: str, lines: list[dict]) -> None:
        files, deleted = {}, []
        for key, value in ((line["key"], line["value"]) for line in lines):
            if key == "header":
                self.server.asked.append((urlsplit(self.path).query, value["summary"]))
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.server.objects:
                    return self.refuse(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                deleted.append(value["path"])
        sha = self.server.commit(name, files, tuple(deleted))
        page = f"{self.server.endpoint}/{name}"
        asked = {"pullRequestUrl": f"{page}/discussions/1"} if "create_pr=1" in urlsplit(self.path).query else {}
        self.answer({"commitUrl": f"{page}/commit/{sha}", "commitOid": sha} | asked)
