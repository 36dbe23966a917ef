"""An S3 on loopback, in memory, with faults on order: the part of its REST API that s3fs uses; and a proxy before a real one.

Uploads follow the real semantics: an object appears or changes only when its upload is complete, never in part.
"""

import hashlib
import re
from dataclasses import dataclass, field
from itertools import count
from typing import Any
from urllib.parse import unquote
from xml.sax.saxutils import escape

import aiohttp
from aiohttp import web

from tests.faulty_server import FaultyServer, Objects, damaged

CODES = {400: "BadDigest", 401: "Unauthorized", 403: "AccessDenied", 404: "NoSuchKey", 410: "Gone", 412: "PreconditionFailed",
         429: "TooManyRequests", 500: "InternalError", 503: "SlowDown"}  # fmt: skip


@dataclass
class FakeS3(FaultyServer):
    """`with FakeS3() as server`: a bucket of any name is there, and any key opens it.

    Kinds: upload (one request), session, part, complete, cancel (of a multipart upload), info, read, list, delete, copy.
    """

    sessions: dict[str, dict[int, bytes]] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    numbers: Any = field(default_factory=count)

    @property
    def env(self) -> dict[str, str]:
        """The environment that makes s3:// URLs of a process come here."""
        return {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1",
        }  # fmt: skip

    def empty(self) -> None:
        """As a new one."""
        for field_ in (self.seen, self.faults, self.hidden, self.deleted, self.sessions, self.etags):
            field_.clear()
        self.objects, self.down_until = Objects(), 0.0

    async def kind_of(self, request: web.Request, body: bytes) -> tuple[str, str, bytes]:
        """As the REST API tells them apart."""
        name, query = unquote(request.raw_path.split("?")[0]).strip("/"), request.query
        key = "/" in name
        if "uploadId" in query:
            kind = {"PUT": "part", "POST": "complete", "DELETE": "cancel"}[request.method]
        elif "uploads" in query:
            kind = "session"
        elif request.method == "PUT":
            kind = "copy" if "x-amz-copy-source" in request.headers else "upload"
        else:
            kind = {"GET": "read" if key else "list", "HEAD": "info", "DELETE": "delete"}[request.method]
        return kind, name, body

    def refuse(self, status: int, code: str = "") -> web.Response:
        """An error document."""
        xml = f"<Error><Code>{code or CODES.get(status, status)}</Code><Message>fault on order</Message></Error>"
        return web.Response(status=status, text=xml, content_type="application/xml")

    def answer(self, kind: str, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        """As the real one does."""
        if request.headers.get("If-None-Match") == "*" and name in self.objects and kind in ("upload", "complete"):
            xml = (
                "<Error><Code>PreconditionFailed</Code><Message>x</Message><Condition>If-None-Match</Condition></Error>"
            )
            return web.Response(status=412, text=xml, content_type="application/xml")
        return getattr(self, f"_{kind}")(request, name, body, fault)

    def _store(self, name: str, data: bytes, etag: str) -> None:
        self.objects[name], self.etags[name] = data, etag

    def _upload(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        self._store(name, body, hashlib.md5(body).hexdigest())
        return web.Response(headers={"ETag": f'"{self.etags[name]}"'})

    def _session(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        number = str(next(self.numbers))
        self.sessions[number] = {}
        return self._xml(
            f"<InitiateMultipartUploadResult><UploadId>{number}</UploadId></InitiateMultipartUploadResult>"
        )

    def _part(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        if request.query["uploadId"] not in self.sessions:
            return self.refuse(404, "NoSuchUpload")
        self.sessions[request.query["uploadId"]][int(request.query["partNumber"])] = body
        return web.Response(headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})

    def _complete(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        parts = self.sessions.pop(request.query["uploadId"], None)
        if parts is None:
            return self.refuse(404, "NoSuchUpload")
        wanted = [int(n) for n in re.findall(rb"<PartNumber>(\d+)</PartNumber>", body)]
        etags = b"".join(hashlib.md5(parts[n]).digest() for n in wanted)
        self._store(name, b"".join(parts[n] for n in wanted), f"{hashlib.md5(etags).hexdigest()}-{len(wanted)}")
        return self._xml("<CompleteMultipartUploadResult/>")

    def _cancel(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        self.sessions.pop(request.query["uploadId"], None)
        return web.Response(status=204)

    def _info(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        if name not in self.objects:
            return web.Response(status=200 if "/" not in name else 404)
        etag = self.etags.get(name) or hashlib.md5(self.objects[name]).hexdigest()
        headers = {"ETag": f'"{etag}"', "Content-Length": str(len(self.objects[name])),
                   "Last-Modified": f"{self.objects.when(name):%a, %d %b %Y %H:%M:%S GMT}"}  # fmt: skip
        return web.Response(headers=headers)

    def _read(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        if name not in self.objects:
            return self.refuse(404)
        data, m = self.objects[name], re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if m and int(m[1]) >= len(data):
            return self.refuse(416)
        part = data[int(m[1]) : int(m[2]) + 1 if m[2] else None] if m else data
        part = damaged(part, fault) if fault in ("truncate", "flip") else part
        return web.Response(body=part, status=206 if m else 200)

    def _list(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter")
        items, prefixes = [], set()
        for o, n_bytes in self.names(name, prefix).items():
            rest = o[len(f"{name}/{prefix}") :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append((o[len(name) + 1 :], n_bytes))
        when = "<LastModified>2026-11-21T00:00:00.000Z</LastModified>"
        found = "".join(f"<Contents><Key>{escape(k)}</Key><Size>{n}</Size>{when}</Contents>" for k, n in items)
        folders = "".join(f"<CommonPrefixes><Prefix>{escape(p)}</Prefix></CommonPrefixes>" for p in sorted(prefixes))
        n = len(items) + len(prefixes)
        return self._xml(f"<ListBucketResult><KeyCount>{n}</KeyCount><IsTruncated>false</IsTruncated>{found}{folders}"
                         "</ListBucketResult>")  # fmt: skip

    def _delete(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        self.objects.pop(name, None)
        return web.Response(status=204)

    def _copy(self, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        source = unquote(request.headers["x-amz-copy-source"]).strip("/")
        if source not in self.objects:
            return self.refuse(404)
        self._upload(request, name, self.objects[source], fault)
        return self._xml(f'<CopyObjectResult><ETag>"{self.etags[name]}"</ETag></CopyObjectResult>')

    def _xml(self, text: str) -> web.Response:
        return web.Response(text=f'<?xml version="1.0" encoding="UTF-8"?>{text}', content_type="application/xml")


@dataclass
class S3Proxy(FakeS3):
    """The same faults before a server that is not ours: what is not damaged on its way is passed on as it is."""

    upstream: str = ""

    async def answer(self, kind: str, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        """What the server behind answers."""
        drop = ("Content-Length", "Transfer-Encoding", "Content-MD5", "x-amz-checksum-crc32")
        headers = {k: v for k, v in request.headers.items() if k not in drop}
        url = self.upstream + request.raw_path
        async with (
            aiohttp.ClientSession(auto_decompress=False) as session,
            session.request(request.method, url, data=body, headers=headers, skip_auto_headers=("Accept",)) as r,
        ):
            data = await r.read()
            kept = {
                k: v for k, v in r.headers.items() if k not in ("Content-Length", "Transfer-Encoding", "Date", "Server")
            }
            if request.method == "HEAD":
                kept["Content-Length"] = r.headers.get("Content-Length", "0")
            if kind == "read" and fault in ("truncate", "flip"):
                data = damaged(data, fault)
            return web.Response(status=r.status, body=data, headers=kept)
