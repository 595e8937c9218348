"""A local stand-in of the Hub: the endpoints by which `huggingface_hub` creates repositories, uploads and downloads.

A test runs its client in a process of its own, since `HF_ENDPOINT` and `HF_HUB_OFFLINE` are read on import.
"""

import base64
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse


class Hub:
    """Repositories: (type, id) -> {path: content}."""

    def __init__(self):
        self.repos = {}

    def files(self, repo_id, kind="model"):
        return self.repos[kind, repo_id]

    def commit_of(self, kind, repo_id):
        content = "".join(f"{name} {blob(data)}" for name, data in sorted(self.repos[kind, repo_id].items()))
        return hashlib.sha1(content.encode()).hexdigest()


def blob(data):
    return hashlib.sha1(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers for the repositories of `server.hub`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, value=None, status=200, headers=None, body=None):
        body = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code="EntryNotFound"):
        self.answer({"error": code}, 404, {"X-Error-Code": code})

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        path, hub = unquote(urlparse(self.path).path), self.server.hub
        if path == "/api/repos/create":
            asked = json.loads(self.body())
            name = f"{asked['organization'] or 'me'}/{asked['name']}" if asked.get("organization") else asked["name"]
            name = name if "/" in name else f"me/{name}"
            kind = asked.get("type") or "model"
            exists = (kind, name) in hub.repos
            hub.repos.setdefault((kind, name), {})
            prefix = "" if kind == "model" else f"{kind}s/"
            url = f"http://{self.headers['Host']}/{prefix}{name}"
            return self.answer({"url": url, "name": name, "id": name}, 409 if exists else 200)
        if path == "/api/validate-yaml":
            self.body()
            return self.answer({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/(model|dataset|space)s/(.+?)/preupload/(.+)", path):
            asked = json.loads(self.body())["files"]
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in asked]
            return self.answer({"files": files, "commitOid": None})
        if found := re.fullmatch(r"/api/(model|dataset|space)s/(.+?)/commit/(.+)", path):
            kind, name, _ = found.groups()
            for line in map(json.loads, self.body().splitlines()):
                if line["key"] == "file":
                    hub.repos[kind, name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = hub.commit_of(kind, name)
            url = f"http://{self.headers['Host']}/{name}/commit/{commit}"
            return self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
        if found := re.fullmatch(r"/api/(model|dataset|space)s/(.+?)/paths-info/(.+)", path):
            kind, name, _ = found.groups()
            text = self.body().decode()
            wanted = json.loads(text)["paths"] if text.startswith("{") else re.findall(r"paths=([^&]*)", text)
            entries = self.entries(kind, name)
            return self.answer([entry for entry in entries if entry["path"] in [unquote(p) for p in wanted]])
        self.body()
        return self.missing()

    def entries(self, kind, name):
        files = self.server.hub.repos[kind, name]
        folders = {"/".join(path.split("/")[:n]) for path in files for n in range(1, path.count("/") + 1)}
        return [
            {"type": "directory", "path": folder, "oid": blob(folder.encode()), "size": 0} for folder in folders
        ] + [{"type": "file", "path": path, "oid": blob(data), "size": len(data)} for path, data in files.items()]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path, hub = unquote(urlparse(self.path).path), self.server.hub
        if path == "/api/whoami-v2":
            return self.answer({"name": "me", "type": "user", "auth": {}, "orgs": []})
        if found := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            kind, name, _ = found.groups()
            if (kind, name) not in hub.repos:
                return self.missing("RepoNotFound")
            names = [{"rfilename": file} for file in hub.repos[kind, name]]
            about = {"id": name, "sha": hub.commit_of(kind, name), "siblings": names, "private": False, "tags": []}
            return self.answer({**about, "modelId": name, "downloads": 0, "likes": 0})
        if found := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            kind, name, _, folder = found.groups()
            if (kind, name) not in hub.repos:
                return self.missing("RepoNotFound")
            under = f"{folder}/*" if folder else "*"
            entries = [entry for entry in self.entries(kind, name) if fnmatch.fnmatch(entry["path"], under)]
            if "recursive=true" not in self.path.lower():
                depth = under.count("/")
                entries = [entry for entry in entries if entry["path"].count("/") == depth]
            return self.answer(entries)
        if found := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, _, file = found.groups()
            kind = kind or "model"
            if (kind, name) not in hub.repos:
                return self.missing("RepoNotFound")
            data = hub.repos[kind, name].get(file)
            if data is None:
                return self.missing()
            headers = {"ETag": f'"{blob(data)}"', "X-Repo-Commit": hub.commit_of(kind, name), "Accept-Ranges": "bytes"}
            if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(part[1]), int(part[2] or len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
                return self.answer(body=data[first : last + 1], status=206, headers=headers)
            return self.answer(body=data, headers={**headers, "Content-Type": "application/octet-stream"})
        return self.missing()


@contextlib.contextmanager
def serve_hub():
    """Yield a [`Hub`] and the address of its server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def run_client(script, endpoint, folder, *arguments):
    """Run a script in a new process that talks to the stand-in; returns what it printed."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_test",
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
