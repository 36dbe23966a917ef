"""An HTTP server on loopback with faults on order: what the fake object stores, and the proxy before a real one, share."""

import asyncio
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime

from aiohttp import web

UPLOADS = ("upload", "chunk", "part")


class Objects(dict[str, bytes]):
    """`written` has when each was stored, in seconds since 1970 by the server's clock, which may be wrong."""

    def __init__(self) -> None:
        self.written: dict[str, float] = {}
        self.clock_ahead_s = 0.0

    def __setitem__(self, name: str, data: bytes) -> None:
        super().__setitem__(name, data)
        self.written[name] = time.time() + self.clock_ahead_s

    def when(self, name: str) -> datetime:
        return datetime.fromtimestamp(self.written[name], UTC)


@dataclass
class FaultyServer:
    """`with Server() as server`: `objects` maps "bucket/key" to bytes, `seen` lists (kind of request, name)."""

    objects: Objects = field(default_factory=Objects)
    seen: list[tuple[str, str]] = field(default_factory=list)
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    hidden: set[str] = field(default_factory=set)  # objects that listings omit
    deleted: dict[str, int] = field(default_factory=dict)  # names and sizes that listings still show
    down_until: float = 0.0  # of the server's clock: till then every connection is dropped
    served: Counter[str] = field(default_factory=Counter)  # bytes read, by object
    bytes_per_s: float | None = None  # of the one line that all uploads and reads share
    fault_rate: float = 0.0  # share of requests that fail in a random way
    rng: random.Random = field(default_factory=lambda: random.Random(1))

    def fail(self, kind: str, fault: int | str, times: int = 1) -> None:
        """Let the next `times` requests of a kind fail.

        A number is an HTTP status; "drop" closes the connection before anything is done, "drop after" once it is
        done; "silent" never answers; "truncate" and "flip" damage the bytes on their way up or down.
        """
        self.faults.setdefault(kind, []).extend([fault] * times)

    def outage(self, seconds: float) -> None:
        """Nobody is there from now on, for that long."""
        self.down_until = self.loop.time() + seconds

    def requests(self, kind: str) -> int:
        """How many requests of a kind have come."""
        return sum(k == kind for k, _ in self.seen)

    def names(self, bucket: str, prefix: str) -> dict[str, int]:
        """What a listing shows, with sizes; it may lie."""
        shown = {n: len(d) for n, d in self.objects.items() if n not in self.hidden} | self.deleted
        return {n: s for n, s in sorted(shown.items()) if n.startswith(f"{bucket}/{prefix}")}

    # ---- what a store has ---------------------------------------------------------------------------------------

    async def kind_of(self, request: web.Request, body: bytes) -> tuple[str, str, bytes]:
        """(kind of request, "bucket/key", bytes of the object)."""
        raise NotImplementedError

    def refuse(self, status: int) -> web.Response:
        """An error in the store's own form."""
        raise NotImplementedError

    def answer(self, kind: str, request: web.Request, name: str, body: bytes, fault: object) -> web.Response:
        """Do it."""
        raise NotImplementedError

    # ---- running ------------------------------------------------------------------------------------------------

    def __enter__(self):
        started = threading.Event()
        self.loop, self.line_free_s = asyncio.new_event_loop(), 0.0

        async def serve() -> None:
            app = web.Application(client_max_size=1 << 30)
            app.router.add_route("*", "/{path:.*}", self._handle)
            self.runner = web.AppRunner(app, shutdown_timeout=0.1)
            await self.runner.setup()
            await web.TCPSite(self.runner, "127.0.0.1", 0).start()
            self.url = f"http://127.0.0.1:{self.runner.addresses[0][1]}"

        def work() -> None:
            self.loop.run_until_complete(serve())
            self.loop.call_soon(started.set)  # not in serve(): a stop that came before it returned would be forgotten
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

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/faults":  # of the server as a process of its own
            self.fault_rate = float(request.query["rate"])
            return web.Response()
        try:
            sent = await request.read()
        except ConnectionResetError:  # whoever asks was killed in the middle of it
            return web.Response()
        kind, name, body = await self.kind_of(request, sent)
        self.seen.append((kind, name))
        if kind in UPLOADS:
            await self._pass(len(body))
        fault = self.faults[kind].pop(0) if self.faults.get(kind) else None
        if self.rng.random() < self.fault_rate:
            fault = self.rng.choice((503, 429, 500, "drop", "drop after", "truncate", "flip"))
        if self.loop.time() < self.down_until:
            fault = "drop"
        if isinstance(fault, int):
            return self.refuse(fault)
        if fault == "silent":
            await asyncio.sleep(60)
        if fault in ("drop", "silent"):
            request.transport.abort()
            return web.Response()
        if fault in ("truncate", "flip") and kind in UPLOADS:
            body = damaged(body, fault)
        response = self.answer(kind, request, name, body, fault)
        response = await response if asyncio.iscoroutine(response) else response
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


def damaged(data: bytes, how: object) -> bytes:
    """The bytes with the last half missing, or with one bit changed in the middle."""
    middle = len(data) // 2
    return data[:middle] if how == "truncate" else data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
