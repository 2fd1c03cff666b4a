"""A server on loopback with the layout of the hub, which fails in the ways that a test asks for."""

import hashlib
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY = "someone/web"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serves ``files`` at one commit. Each request for data takes the next of ``faults`` and suffers it."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = files
        self.faults = []
        self.forever = None
        self.requests = []
        self.released = threading.Event()
        self.commit = COMMIT
        self.url = f"http://127.0.0.1:{self.server_port}"

    def data_requests(self):
        return [path for method, path in self.requests if method == "GET" and path.startswith("/cdn/")]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(("POST", self.path))
        if "/paths-info/" not in self.path:
            return self.answer(404)
        if self.headers["Content-Type"].startswith("application/json"):
            paths = json.loads(body)["paths"]
        else:
            paths = [unquote(pair.partition("=")[2].replace("+", " ")) for pair in body.decode().split("&")]
        return self.json([entry for entry in self.tree() if entry["path"] in paths])

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        if path.startswith(f"/api/datasets/{REPOSITORY}/tree/"):
            return self.json(self.tree(inside=path.partition("/tree/")[2].partition("/")[2]))
        if path in (f"/api/datasets/{REPOSITORY}", f"/api/datasets/{REPOSITORY}/revision/{self.server.commit}"):
            siblings = [{"rfilename": name} for name in self.server.files]
            return self.json({"id": REPOSITORY, "sha": self.server.commit, "siblings": siblings, "tags": []})
        start = f"/datasets/{REPOSITORY}/resolve/{self.server.commit}/"
        if path.startswith(start) and path.removeprefix(start) in self.server.files:
            return self.resolve(path.removeprefix(start))
        if path.startswith("/cdn/"):
            return self.data(path.removeprefix("/cdn/"))
        return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.server.commit})

    def tree(self, inside=""):
        entries = []
        for folder in sorted({name.rpartition("/")[0] for name in self.server.files} - {"", inside}):
            entries.append({"type": "directory", "path": folder, "oid": "0" * 40, "size": 0})
        for name, content in self.server.files.items():
            if name.startswith(inside):
                sha256 = hashlib.sha256(content).hexdigest()
                entry = {"type": "file", "path": name, "size": len(content), "oid": sha256[:40]}
                if name.endswith((".parquet", ".jsonl")):
                    entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
                entries.append(entry)
        return entries

    def resolve(self, name):
        content = self.server.files[name]
        headers = {"X-Repo-Commit": self.server.commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        if name.endswith((".parquet", ".jsonl")):
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(content).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(content))
            headers["Location"] = f"{self.server.url}/cdn/{name}"
            return self.answer(302, headers)
        return self.answer(200, headers, content)

    def data(self, name):
        content = self.server.files[name]
        headers = {}
        status, start, stop = 200, 0, len(content)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            status, start, stop = 206, int(first), min(int(last) + 1, len(content))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        fault = self.server.forever or (self.server.faults.pop(0) if self.server.faults else None)
        if fault is None:
            return self.answer(status, headers, content[start:stop])
        kind, *value = fault if isinstance(fault, tuple) else (fault,)
        if isinstance(kind, int):
            return self.answer(kind, {"Retry-After": str(value[0])} if value else {})
        if kind == "silence":
            self.server.released.wait(20)
            self.close_connection = True
            return None
        if kind == "truncate":
            self.close_connection = True
            return self.answer(status, headers, content[start:stop], send=(stop - start) // 2)
        if kind == "reset":
            self.close_connection = True
            return None
        if kind == "drip":
            return self.answer(status, headers, content[start:stop], pause_s=0.02)
        if kind == "no range":
            return self.answer(200, {}, content)
        raise AssertionError(kind)

    def json(self, value):
        return self.answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def answer(self, status, headers=None, body=b"", send=None, pause_s=0.0):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            if not pause_s:
                self.wfile.write(body[:send])
            for i in range(0, len(body) if pause_s else 0, 10):
                self.wfile.write(body[i : i + 10])
                time.sleep(pause_s)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


@contextmanager
def serving(files):
    """A running hub."""
    hub = Hub(files)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        hub.shutdown()
        hub.server_close()
        thread.join()
