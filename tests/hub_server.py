"""A Hub on loopback: as much of the Hugging Face Hub's HTTP interface as pushing to it and loading from it needs.

The real ``huggingface_hub`` client talks to it: create, preupload, LFS batch and upload, commit, info, tree, resolve.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote


class Hub:
    """The server: ``repos[name][path]`` is a file's content. Use as a context.

    `fail_at` gives, by repository, a step (``"create"``, ``"lfs"``, ``"commit"``) at which its next push is refused.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.objects: dict[str, bytes] = {}
        self.fail_at: dict[str, str] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: str | Path) -> dict[str, str]:
        """Variables for a process whose Hub this is, with a cache of its own."""
        return {
            **os.environ,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_test",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
        }

    def sha(self, repo: str) -> str:
        return hashlib.sha1(f"{repo}{len(self.commits[repo])}".encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self, repo: str, step: str) -> bool:
        if self.hub.fail_at.get(repo) != step:
            return False
        del self.hub.fail_at[repo]
        self.answer({"error": f"refused at {step}"}, 403)
        return True

    def missing(self, what: str) -> None:
        self.answer({"error": what}, 404, X_Error_Code=what)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(self.path.split("?")[0])
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'founder'}/{asked['name'].split('/')[-1]}"
            if self.refuse(repo, "create"):
                return
            self.hub.repos.setdefault(repo, {})
            self.hub.commits.setdefault(repo, ["initial commit"])
            self.answer({"url": f"{self.hub.url}/{repo}", "id": repo, "name": repo})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
            files = [
                {**file, "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".bin")) else "regular"}
                for file in json.loads(body)["files"]
            ]
            keep = ("path", "uploadMode")
            self.answer({"files": [{key: file[key] for key in keep} | {"shouldIgnore": False} for file in files]})
        elif match := re.fullmatch(r"/(.+).git/info/lfs/objects/batch", path):
            if self.refuse(match[1], "lfs"):
                return
            objects = [
                {**entry, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}}
                for entry in json.loads(body)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
            if self.refuse(match[1], "commit"):
                return
            self.commit(match[1], [json.loads(line) for line in body.splitlines() if line.strip()])
        else:
            self.missing(f"NoSuchRoute {path}")

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.hub.repos[repo]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "header":
                self.hub.commits[repo].append(value["summary"])
        sha = self.hub.sha(repo)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{sha}"})

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[oid] = data
        self.answer({})

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(match[1], match[3])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            if match[1] not in self.hub.repos:
                return self.missing("RepoNotFound")
            siblings = [{"rfilename": name} for name in self.hub.repos[match[1]]]
            self.answer({"id": match[1], "sha": self.hub.sha(match[1]), "siblings": siblings, "tags": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
            files = self.hub.repos.get(match[1], {})
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            self.answer(tree)
        else:
            self.missing(f"NoSuchRoute {path}")

    do_HEAD = do_GET

    def resolve(self, repo: str, name: str) -> None:
        files = self.hub.repos.get(repo)
        if files is None:
            return self.missing("RepoNotFound")
        if name not in files:
            return self.answer({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=self.hub.sha(repo))
        etag = hashlib.sha256(files[name]).hexdigest()
        self.answer(files[name], 200, ETag=f'"{etag}"', X_Repo_Commit=self.hub.sha(repo), Accept_Ranges="none")
