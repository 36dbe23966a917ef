"""Serve a trained model as OpenAI's API does, with a page to talk with it: `python scripts/serve.py --run out`.

POST /v1/chat/completions and /v1/completions, GET /v1/models, and the page at /. Needs starlette and uvicorn
(requirements-extra.txt).
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import asyncio
import base64
import functools
import hashlib
import hmac
import itertools
import re
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from gpt.compiled import compile_decoding
from gpt.decoding import lay_out_for_decoding
from gpt.errors import GPTError
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from scripts.answering import Answer, TooLong, fit
from scripts.loading import load_model
from scripts.openai_api import ApiError, Asked, Reply, event, read_request, usage

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

PAGE = Path(__file__).with_name("chat_page.html")
MOST_BYTES = 4 << 20  # of a request
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEFAULTS = {"temperature": 0.8, "top_k": 50}  # small models do badly at OpenAI's 1.0 among all tokens


@dataclass(frozen=True)
class ServeFlags:
    """Flags of scripts/serve.py."""

    run: str = flag("out", "run folder or URL: the --out of train/run.py", env="PERENNIAL_OUT")
    name: str = flag("", "the model's name in the API (default: that of the run's folder)")
    host: str = flag("127.0.0.1", "address to listen at; 0.0.0.0: the whole network")
    port: int = flag(8000, "port; 0: any free one")
    api_key: str = flag(
        "", "refuse requests without this key (better given by the environment)", env="PERENNIAL_API_KEY"
    )
    max_tokens: int = flag(256, "longest answer to a request that names none")
    step: int | None = flag(None, "checkpoint of this step instead of the newest")
    device: str = flag("auto", "cuda, mps, cpu, or auto")
    compile: bool = flag(
        False, "decode by one compiled graph, on a GPU a CUDA graph: its first token takes up to a minute"
    )


class Server:
    """One model and those who wait for it: requests are answered one at a time, in the order of their coming."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, args: ServeFlags) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.name = args.name or args.run.rstrip("/").rsplit("/", 1)[-1] or "model"
        self.turn = asyncio.Lock()  # those who wait get it first come, first served
        self.since = int(time.time())

    def answer(self, asked: Asked) -> tuple[Answer, int]:
        """(the answer, not begun yet; tokens of the prompt). Raises ApiError."""
        if asked.model != self.name:
            raise ApiError(f"the model {asked.model!r} is not here, {self.name!r} is", status=404, param="model",
                           code="model_not_found")  # fmt: skip
        wanted, block_size = asked.max_tokens or self.args.max_tokens, self.model.config.block_size
        try:
            if asked.turns is not None:
                ids, _ = fit(self.tokenizer, asked.turns, block_size=block_size, answer=wanted)
            else:
                ids = [self.tokenizer.end_of_text, *self.tokenizer.encode(asked.prompt)]
                if len(ids) >= block_size:
                    raise TooLong(f"the prompt is {len(ids)} tokens long, the model's context {block_size}: shorten it")
            most = min(wanted, block_size - len(ids))
            sampling = DEFAULTS | asked.sampling
            answer = Answer(self.model, self.tokenizer, ids, max_tokens=most, stop=asked.stop, **sampling)
        except GPTError as e:
            raise ApiError(str(e), code="context_length_exceeded" if isinstance(e, TooLong) else None) from e
        return answer, len(ids)

    async def pieces(self, answer: Answer) -> AsyncIterator[str]:
        """The text of an answer, from when its turn has come. Closing it stops the model before its next token.

        The model never waits for a client that reads slowly: the next turn comes when the answer is made, and what is made
        is kept, at most a context of it.
        """
        made: asyncio.Queue[str | None] = asyncio.Queue()
        nobody_reads, loop = threading.Event(), asyncio.get_running_loop()

        def make() -> None:
            for piece in itertools.takewhile(lambda _: not nobody_reads.is_set(), answer):
                loop.call_soon_threadsafe(made.put_nowait, piece)

        async def in_turn() -> None:
            try:
                async with self.turn:
                    if not nobody_reads.is_set():
                        await asyncio.to_thread(make)
            finally:
                made.put_nowait(None)

        making = asyncio.create_task(in_turn())
        try:
            while (piece := await made.get()) is not None:
                yield piece
            await making  # raises what it raised
        finally:
            nobody_reads.set()

    async def whole(self, answer: Answer) -> str:
        """All of an answer."""
        async with aclosing(self.pieces(answer)) as pieces:
            return "".join([piece async for piece in pieces])

    async def events(self, asked: Asked, answer: Answer, prompt_tokens: int, reply: Reply) -> AsyncIterator[str]:
        """An answer as server-sent events."""
        begun_s = time.monotonic()
        try:
            if reply.chat:
                yield event(reply.piece("", first=True))
            async with aclosing(self.pieces(answer)) as pieces:
                async for piece in pieces:
                    yield event(reply.piece(piece))
            yield event(reply.piece(None, answer.finish))
            if asked.include_usage:
                yield event(reply.usage(usage(prompt_tokens, answer.tokens)))
            yield event("[DONE]")
        except GPTError as e:  # the status has been sent long ago
            yield event(ApiError(str(e), status=500).body())
        finally:
            log(answer, prompt_tokens, begun_s)

    async def complete(self, request: "Request", *, chat: bool) -> "Response":
        """Answer one POST. Raises ApiError."""
        from starlette.responses import JSONResponse, Response

        asked = read_request(await read_body(request), chat=chat)
        answer, prompt_tokens = self.answer(asked)
        reply = Reply(("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12), int(time.time()), self.name, chat)
        if asked.stream:
            return event_stream(self.events(asked, answer, prompt_tokens, reply))
        begun_s = time.monotonic()
        reading, leaving = asyncio.create_task(self.whole(answer)), asyncio.create_task(client_left(request))
        try:
            await asyncio.wait((reading, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return Response(status_code=499)  # which nobody gets
            return JSONResponse(reply.whole(reading.result(), answer.finish, usage(prompt_tokens, answer.tokens)))
        except GPTError as e:
            raise ApiError(str(e), status=500) from e
        finally:
            reading.cancel()
            leaving.cancel()
            log(answer, prompt_tokens, begun_s)


def log(answer: Answer, prompt_tokens: int, begun_s: float) -> None:
    """One line on stderr for each answer: never what was said."""
    end = answer.finish or "the client left"
    print(f"answered   {prompt_tokens} + {answer.tokens} tokens in {time.monotonic() - begun_s:.1f} s: {end}",
          file=sys.stderr, flush=True)  # fmt: skip


def event_stream(events: AsyncIterator[str]) -> "Response":
    """A response that sends the events, and closes them when the client leaves: its turn must not stay taken."""
    from starlette.responses import StreamingResponse

    class EventStream(StreamingResponse):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async with aclosing(events):
                await super().__call__(scope, receive, send)

    # the second header keeps nginx from holding pieces back
    return EventStream(
        events, media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )


async def client_left(request: "Request") -> None:
    """Wait until the client closes its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_body(request: "Request") -> bytes:
    """The body of a request. Raises ApiError for what is too large, or not declared as JSON.

    A page of another site can make a browser post text here, but not JSON without being allowed to.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError("expected Content-Type: application/json", status=415)
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise ApiError(f"the body is larger than {MOST_BYTES >> 20} MiB", status=413)
    return body


def make_app(server: Server) -> "Starlette":
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import HTMLResponse, JSONResponse
    from starlette.routing import Route

    html = PAGE.read_text("utf-8")
    policy = content_policy(html)
    args = server.args

    def refused(request: "Request", error: Exception) -> JSONResponse:
        if isinstance(error, HTTPException):  # the router's own: no such path or method
            error = ApiError(f"{request.method} {request.url.path}: {error.detail}", status=error.status_code)
        elif not isinstance(error, ApiError):
            error = ApiError("the server failed; its log tells why", status=500)
        return JSONResponse(error.body(), error.status)

    def with_key(
        endpoint: Callable[["Request"], Awaitable["Response"]],
    ) -> Callable[["Request"], Awaitable["Response"]]:
        async def checked(request: "Request") -> "Response":
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            # in constant time: the time it takes must not tell how much of a guess is right
            if args.api_key and not (
                scheme.lower() == "bearer" and hmac.compare_digest(key.encode("latin-1"), args.api_key.encode())
            ):
                raise ApiError("the API key is missing or wrong", status=401, code="invalid_api_key")
            return await endpoint(request)

        return checked

    async def page(request: "Request") -> HTMLResponse:
        return HTMLResponse(html, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    async def models(request: "Request") -> JSONResponse:
        card = {"id": server.name, "object": "model", "created": server.since, "owned_by": "perennial"}
        return JSONResponse({"object": "list", "data": [card]})

    routes = [
        Route("/", page),
        Route("/v1/models", with_key(models)),
        Route("/v1/chat/completions", with_key(functools.partial(server.complete, chat=True)), methods=["POST"]),
        Route("/v1/completions", with_key(functools.partial(server.complete, chat=False)), methods=["POST"]),
    ]
    # a site whose name is made to point at this machine must not talk to a server that asks for no key
    hosts = [*LOOPBACK[:2], "[::1]"] if args.host in LOOPBACK and not args.api_key else ["*"]
    return Starlette(
        routes=routes,
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={ApiError: refused, HTTPException: refused, Exception: refused},
    )


def content_policy(html: str) -> str:
    """The Content-Security-Policy of the page: its own inline script and style, requests to this server, nothing else."""
    inline = {}
    for tag in ("script", "style"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[1]
        inline[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (f"default-src 'none'; connect-src 'self'; img-src data:; script-src 'sha256-{inline['script']}'; "
            f"style-src 'sha256-{inline['style']}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Listen until Ctrl-C."""
    args, _ = flags.parse(ServeFlags, argv, prog="serve.py", description=__doc__.split("\n")[0])
    try:
        import starlette  # noqa: F401 - only asked for
        import uvicorn
    except ImportError as e:
        raise UserError(f"{e.name} is missing: pip install starlette uvicorn") from e
    if args.max_tokens < 1:
        raise UserError(f"--max-tokens {args.max_tokens}: expected 1 or more")
    try:
        listening = socket.create_server(
            (args.host, args.port), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET
        )
    except (OSError, OverflowError) as e:
        raise UserError(f"--host {args.host} --port {args.port}: cannot listen there ({e}); choose another") from e
    with listening:
        model, tokenizer = load_model(args.run, device=args.device, step=args.step)
        lay_out_for_decoding(model)
        if args.compile:
            compile_decoding(model)
        server = Server(model, tokenizer, args)
        shown = f"[{args.host}]" if ":" in args.host else args.host
        print(
            f"model      {server.name}: {model.num_params() / 1e6:.1f} M parameters, context {model.config.block_size} tokens"
        )
        print(f"page       http://{shown}:{listening.getsockname()[1]}/")
        print(f"api        http://{shown}:{listening.getsockname()[1]}/v1", flush=True)
        if args.host not in LOOPBACK and not args.api_key:
            print("warning: anybody who can reach this machine can use the model: give --api-key", file=sys.stderr)
        config = uvicorn.Config(make_app(server), log_level="warning", access_log=False, timeout_graceful_shutdown=2)
        uvicorn.Server(config).run(sockets=[listening])
    return 0


if __name__ == "__main__":
    flags.run(main)
