"""A Google Cloud Storage on loopback, in memory, with faults on order: the part of its JSON API that gcsfs uses.

Uploads follow the real semantics: an object appears or changes only when its upload is complete, never in part.
"""

import asyncio
import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from tests.faulty_server import FaultyServer, damaged

API = re.compile(
    r"/(?P<door>upload/|download/)?storage/v1/b/(?P<bucket>[^/]+)(?:/o(?:/(?P<key>[^/]+)(?P<rest>/.+)?)?)?$"
)


MOST_SESSIONS = 20  # uploads that are begun and not complete


@dataclass
class FakeGCS(FaultyServer):
    """`with FakeGCS() as server`: a bucket of any name is there, and anyone may use it.

    Kinds: upload (small, one request), session, chunk, cancel (of a resumable upload), info, read, list, delete, copy.
    """

    sessions: dict[str, tuple[str, bytearray | None]] = field(default_factory=dict)  # None: the upload is complete
    numbers: Any = field(default_factory=count)

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

    async def kind_of(self, request: web.Request, body: bytes) -> tuple[str, str, bytes]:
        m = API.match(request.raw_path.split("?")[0])
        if not m or request.method not in ("GET", "HEAD", "POST", "DELETE"):
            raise web.HTTPNotImplemented(text=f"not in this fake: {request.method} {request.raw_path}")
        bucket, key, query = unquote(m["bucket"]), unquote(m["key"] or ""), request.query
        name = f"{bucket}/{key or query.get('name', '')}"
        kind = {"GET": "info" if key else "list", "HEAD": "read", "DELETE": "delete", "POST": "copy"}[request.method]
        if m["door"] == "download/" or query.get("alt") == "media":
            kind = "read"
        elif m["door"] == "upload/" and "session" in query:
            if query["session"] not in self.sessions:
                raise web.HTTPGone
            kind, name = "cancel" if request.method == "DELETE" else "chunk", self.sessions[query["session"]][0]
        elif m["door"] == "upload/":
            kind = "session" if query["uploadType"] == "resumable" else "upload"
        if kind == "upload":
            _, meta, body = body.split(b"\n\n", 2)
            name, body = f"{bucket}/{json.loads(meta.split(b'--==')[0])['name']}", body[: -len(b"\n--==0==--")]
        return kind, name, body

    def refuse(self, status: int) -> web.Response:
        return web.json_response({"error": {"code": status, "message": "fault on order"}}, status=status)

    def answer(self, kind: str, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        exclusive = request.query.get("ifGenerationMatch") == "0"
        if exclusive and name in self.objects and kind in ("upload", "session", "chunk"):
            return self.refuse(412)
        return getattr(self, f"_{kind}")(request, name, body, fault)

    def _info(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        return web.json_response(self._about(name)) if name in self.objects else web.Response(status=404)

    def _about(self, name: str) -> dict[str, str]:
        data, (bucket, key) = self.objects[name], name.split("/", 1)
        md5 = base64.b64encode(hashlib.md5(data).digest()).decode()
        updated = f"{self.objects.when(name):%Y-%m-%dT%H:%M:%S.%f}"[:-3] + "Z"
        return {"kind": "storage#object", "bucket": bucket, "name": key, "size": str(len(data)), "md5Hash": md5,
                "updated": updated}  # fmt: skip

    def _list(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        bucket, prefix, delimiter = name.split("/")[0], request.query.get("prefix", ""), request.query.get("delimiter")
        if not request.path.endswith("/o"):
            return web.json_response({"kind": "storage#bucket", "name": bucket})
        items, prefixes = [], set()
        for o, n_bytes in self.names(bucket, prefix).items():
            rest = o[len(f"{bucket}/{prefix}") :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(
                    {"kind": "storage#object", "bucket": bucket, "name": o[len(bucket) + 1 :], "size": str(n_bytes)}
                )
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
        begun = [n for n, (_, data) in self.sessions.items() if data is not None]
        for old in begun[:-MOST_SESSIONS]:  # whoever began them is gone, and an hour of them filled 20 GB
            del self.sessions[old]
        self.sessions[number] = (name, bytearray())
        bucket = name.split("/")[0]
        match = "&ifGenerationMatch=0" if request.query.get("ifGenerationMatch") == "0" else ""
        return web.Response(headers={"Location": f"{self.url}/upload/storage/v1/b/{bucket}/o?session={number}{match}"})

    def _chunk(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        data = self.sessions[request.query["session"]][1]
        if data is None:  # asked again, as its answer was lost
            return self._info(request, name, body, fault)
        first, last, total = map(
            int, re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", request.headers["Content-Range"]).groups()
        )
        if fault == "partial":
            body = body[: len(body) // 2]
        data[first:] = body
        if last + 1 < total or fault == "partial":
            return web.Response(status=308, headers={"Range": f"bytes=0-{len(data) - 1}"})
        self.sessions[request.query["session"]] = (name, None)
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


if __name__ == "__main__":  # prints its address, and serves until it is killed
    with FakeGCS() as server:
        print(server.url, flush=True)
        threading.Event().wait()
