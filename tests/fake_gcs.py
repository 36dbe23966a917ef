"""A Google Cloud Storage on loopback, in memory, with faults on order: the part of its JSON API that gcsfs uses.

Uploads follow the real semantics: an object appears or changes only when its upload is complete, never in part.
"""

import asyncio
import base64
import hashlib
import json
import random
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

from aiohttp import web

API = re.compile(
    r"/(?P<door>upload/|download/)?storage/v1/b/(?P<bucket>[^/]+)(?:/o(?:/(?P<key>[^/]+)(?P<rest>/.+)?)?)?$"
)


@dataclass
class FakeGCS:
    """`with FakeGCS() as server`: `objects` maps "bucket/key" to bytes, `seen` lists (kind of request, name).

    Kinds: upload (small, one request), session, chunk, cancel (of a resumable upload), info, read, list, delete, copy.
    """

    objects: dict[str, bytes] = field(default_factory=dict)
    seen: list[tuple[str, str]] = field(default_factory=list)
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    sessions: dict[str, tuple[str, bytearray]] = field(default_factory=dict)
    numbers: Any = field(default_factory=count)
    served: Counter[str] = field(default_factory=Counter)  # bytes read, by object
    bytes_per_s: float | None = None  # of the one line that all uploads and reads share
    fault_rate: float = 0.0  # share of requests that fail in a random way
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    def fail(self, kind: str, fault: int | str, times: int = 1) -> None:
        """Let the next `times` requests of a kind fail.

        A number is an HTTP status; "drop" closes the connection before anything is done, "drop after" once it is
        done; "truncate" and "flip" damage the bytes on their way up or down; "partial" takes half of a chunk.
        """
        self.faults.setdefault(kind, []).extend([fault] * times)

    def requests(self, kind: str) -> int:
        """How many requests of a kind have come."""
        return sum(k == kind for k, _ in self.seen)

    # ---- running ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> "FakeGCS":
        started = threading.Event()
        self.loop, self.line_free_s = asyncio.new_event_loop(), 0.0

        async def serve() -> None:
            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", "/{path:.*}", self._handle)
            self.runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self.runner.setup()
            await web.TCPSite(self.runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"
            started.set()

        def work() -> None:
            self.loop.run_until_complete(serve())
            self.loop.run_forever()
            self.loop.run_until_complete(self.runner.cleanup())
            self.loop.close()

        self.thread = threading.Thread(target=work, daemon=True)
        self.thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    @property
    def env(self) -> dict[str, str]:
        """The environment that makes gs:// URLs of a process come here."""
        names = ("STORAGE_EMULATOR_HOST", "FSSPEC_GCS_TOKEN", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT")
        return dict(zip(names, (self.url, "anon", "false"), strict=True))

    def attach(self, monkeypatch: Any) -> None:
        """Make this process anonymous too, and gcsfs's own six tries follow each other without their 33 s of pauses."""
        import fsspec
        import gcsfs.retry

        monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        monkeypatch.setattr(gcsfs.retry, "asyncio", SimpleNamespace(sleep=lambda s: asyncio.sleep(s / 1000)))

    # ---- answering --------------------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/faults":  # of the server as a process of its own
            self.fault_rate = float(request.query["rate"])
            return web.Response()
        m = API.match(request.raw_path.split("?")[0])
        if not m or request.method not in ("GET", "HEAD", "POST", "DELETE"):
            return web.Response(status=501, text=f"not in this fake: {request.method} {request.raw_path}")
        bucket, key, query = unquote(m["bucket"]), unquote(m["key"] or ""), request.query
        name, body = f"{bucket}/{key or query.get('name', '')}", await request.read()
        kind = {"GET": "info" if key else "list", "HEAD": "read", "DELETE": "delete", "POST": "copy"}[request.method]
        if m["door"] == "download/" or query.get("alt") == "media":
            kind = "read"
        elif m["door"] == "upload/" and "session" in query:
            kind, name = "cancel" if request.method == "DELETE" else "chunk", self.sessions[query["session"]][0]
        elif m["door"] == "upload/":
            kind = "session" if query["uploadType"] == "resumable" else "upload"
        if kind == "upload":
            _, meta, body = body.split(b"\n\n", 2)
            name, body = f"{bucket}/{json.loads(meta.split(b'--==')[0])['name']}", body[: -len(b"\n--==0==--")]
        self.seen.append((kind, name))
        if kind in ("upload", "chunk"):
            await self._pass(len(body))
        fault = self.faults[kind].pop(0) if self.faults.get(kind) else None
        if query.get("ifGenerationMatch") == "0" and name in self.objects and kind in ("upload", "session", "chunk"):
            fault = fault or 412
        if self.rng.random() < self.fault_rate:
            fault = self.rng.choice((503, 429, 500, "drop", "drop after", "truncate", "flip"))
        if query.get("ifGenerationMatch") == "0" and name in self.objects and kind in ("upload", "session", "chunk"):
            fault = fault or 412
        if isinstance(fault, int):
            return web.json_response({"error": {"code": fault, "message": "fault on order"}}, status=fault)
        if fault == "drop":
            request.transport.abort()
        if fault in ("truncate", "flip") and kind in ("upload", "chunk"):
            body = damaged(body, fault)
        response = web.Response() if fault == "drop" else getattr(self, f"_{kind}")(request, name, body, fault)
        if kind == "read" and request.method == "GET" and response.body:
            await self._pass(len(response.body))
            if request.transport:  # else whoever asked is gone
                self.served[name] += len(response.body)
        if fault == "drop after":
            request.transport.abort()
        return response

    async def _pass(self, n_bytes: int) -> None:
        if self.bytes_per_s:
            self.line_free_s = max(self.line_free_s, self.loop.time()) + n_bytes / self.bytes_per_s
            await asyncio.sleep(self.line_free_s - self.loop.time())

    def _info(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        return web.json_response(self._about(name)) if name in self.objects else web.Response(status=404)

    def _about(self, name: str) -> dict[str, str]:
        data, (bucket, key) = self.objects[name], name.split("/", 1)
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        return {"kind": "storage#object", "bucket": bucket, "name": key, "size": str(len(data)), "md5Hash": md5}

    def _list(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        bucket, prefix, delimiter = name.split("/")[0], request.query.get("prefix", ""), request.query.get("delimiter")
        if not request.path.endswith("/o"):
            return web.json_response({"kind": "storage#bucket", "name": bucket})
        items, prefixes = [], set()
        for o in sorted(self.objects):
            if o.startswith(f"{bucket}/{prefix}"):
                rest = o[len(f"{bucket}/{prefix}") :]
                if delimiter and delimiter in rest:
                    prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
                else:
                    items.append(self._about(o))
        return web.json_response({"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def _read(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        if name not in self.objects:
            return web.Response(status=404)
        data, m = self.objects[name], re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if m and int(m[1]) >= len(data):
            return web.Response(status=416)
        part = data[int(m[1]) : int(m[2]) + 1 if m[2] else None] if m else data
        part = damaged(part, fault) if fault in ("truncate", "flip") else part
        return web.Response(body=part, status=206 if m else 200)

    def _upload(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        self.objects[name] = body
        return web.json_response(self._about(name))

    def _session(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        number = str(next(self.numbers))
        self.sessions[number] = (name, bytearray())
        bucket = name.split("/")[0]
        match = "&ifGenerationMatch=0" if request.query.get("ifGenerationMatch") == "0" else ""
        return web.Response(headers={"Location": f"{self.url}/upload/storage/v1/b/{bucket}/o?session={number}{match}"})

    def _chunk(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        data = self.sessions[request.query["session"]][1]
        first, last, total = map(
            int, re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", request.headers["Content-Range"]).groups()
        )
        if fault == "partial":
            body = body[: len(body) // 2]
        data[first:] = body
        if last + 1 < total or fault == "partial":
            return web.Response(status=308, headers={"Range": f"bytes=0-{len(data) - 1}"})
        return self._upload(request, name, bytes(data), fault)

    def _cancel(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        return web.Response(status=499)

    def _delete(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        return web.Response(status=204 if self.objects.pop(name, None) is not None else 404)

    def _copy(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        source, target = re.fullmatch(r".*/b/([^/]+/o/[^/]+)/rewriteTo/b/([^/]+/o/[^/]+)", request.raw_path).groups()
        source, target = (unquote(n.replace("/o/", "/", 1)) for n in (source, target))
        if source not in self.objects:
            return web.Response(status=404)
        self.objects[target] = self.objects[source]
        return web.json_response({"done": True, "resource": self._about(target)})


def damaged(data: bytes, how: object) -> bytes:
    """The bytes with the last half missing, or with one bit changed in the middle."""
    middle = len(data) // 2
    return data[:middle] if how == "truncate" else data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


if __name__ == "__main__":  # prints its address, and serves until it is killed
    with FakeGCS() as server:
        print(server.url, flush=True)
        threading.Event().wait()
