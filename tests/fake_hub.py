"""A Hugging Face hub on loopback with one dataset, `org/name`: as much of its API as HfFileSystem needs to read."""

import http.server
import json
import re
import threading
import urllib.parse


class FakeHub:
    """`with FakeHub({"data/a.jsonl": b"…"}) as hub:`, and `HF_ENDPOINT=hub.url` in the environment of its readers."""

    def __init__(self, files: dict[str, bytes]) -> None:
        handler = type("Handler", (_Handler,), {"files": files})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    files: dict[str, bytes]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urllib.parse.urlparse(self.path)
        path = urllib.parse.unquote(url.path)
        if path in ("/api/datasets/org/name", "/api/datasets/org/name/revision/main"):
            return self.answer(200, json.dumps({"id": "org/name", "sha": "a" * 40, "siblings": []}).encode())
        if m := re.fullmatch(r"/api/datasets/org/name/tree/main/?(.*)", path):
            recursive = "recursive=true" in url.query.lower()
            return self.answer(200, json.dumps(self.tree(m[1], recursive)).encode())
        if (m := re.fullmatch(r"/datasets/org/name/resolve/main/(.*)", path)) and m[1] in self.files:
            data, asked = self.files[m[1]], re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            first, last = (int(asked[1]), min(int(asked[2]), len(data) - 1)) if asked else (0, len(data) - 1)
            ranges = {"Content-Range": f"bytes {first}-{last}/{len(data)}"} if asked else {}
            return self.answer(206 if asked else 200, data[first : last + 1], ranges)
        return self.answer(404, b'{"error": "not here"}')

    do_HEAD = do_GET

    def tree(self, folder: str, recursive: bool) -> list[dict]:
        found = {}
        for name, data in self.files.items():
            parts = name.split("/")
            for depth in range(1, len(parts)):
                path = "/".join(parts[:depth])
                found[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
            found[name] = {"type": "file", "path": name, "oid": "1" * 40, "size": len(data)}
        inside = [e for p, e in found.items() if not folder or p.startswith(folder + "/")]
        skip = len(folder) + 1 if folder else 0
        return [e for e in inside if recursive or "/" not in e["path"][skip:]]

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass
