"""The OpenAI-compatible server, over real HTTP on loopback: what it answers, refuses, stops and in which order."""

import contextlib
import http.client
import json
import re
import signal
import socket
import subprocess
import threading
import time

import pytest
import torch

from gpt.model import GPT, GPTConfig
from gpt.tokenizer import Tokenizer
from scripts import serve
from scripts.answering import Answer, TooLong, fit
from scripts.openai_api import ApiError, read_request
from tests.helpers import error_of, start, train
from tests.test_resume import SMALL

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

HELLO = [{"role": "user", "content": "Hello there"}]
BLOCK = 1024


@pytest.fixture(scope="module")
def tokenizer(data):
    return Tokenizer((data / "tokenizer.json").read_text())


@pytest.fixture(scope="module")
def model():
    """Random weights: it talks on and on."""
    torch.manual_seed(3)
    model = GPT(GPTConfig(vocab_size=512, block_size=BLOCK, n_layer=2, n_head=2, n_embd=32)).eval()
    torch.nn.init.normal_(model.head.weight)
    model.head.weight.data[:5] = -1  # no special id is ever likely
    return model


@contextlib.contextmanager
def serving(model, tokenizer, **flags):
    """The port of a real server in a thread of this process."""
    server = serve.Server(model, tokenizer, serve.ServeFlags(run="runs/mini", **flags))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = serve.make_app(server)
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def port(model, tokenizer):
    with serving(model, tokenizer) as port:
        yield port


def ask(port, path="/v1/chat/completions", *, method="POST", headers=None, raw=None, **body):
    """The open response to a request; `.connection` closes it."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = raw if raw is not None else json.dumps({"model": "mini", "max_tokens": 20, **body})
    headers = {"Content-Type": "application/json"} | (headers or {})
    connection.request(method, path, data if method == "POST" else None, headers)
    response = connection.getresponse()
    response.connection = connection
    return response


def answer(port, **body):
    response = ask(port, **body)
    assert response.status == 200
    return json.load(response)


def events(response):
    """The data of each server-sent event, to the end."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.read().decode().split("\n\n")
    assert lines.pop() == ""
    assert all(line.startswith("data: ") for line in lines)
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# ---- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_is_what_the_model_says(port, model, tokenizer):
    got = answer(port, messages=HELLO, temperature=0)
    ids = tokenizer.render([("user", "Hello there")], reply=True)
    expected = "".join(Answer(model, tokenizer, ids, max_tokens=20, temperature=0))
    assert got["choices"][0] == {"index": 0, "message": {"role": "assistant", "content": expected, "refusal": None},
                                 "logprobs": None, "finish_reason": "length"}  # fmt: skip
    assert got["usage"] == {"prompt_tokens": len(ids), "completion_tokens": 20, "total_tokens": len(ids) + 20}
    assert (got["object"], got["model"]) == ("chat.completion", "mini")


def test_a_completion_goes_on_with_plain_text(port, model, tokenizer):
    got = answer(port, path="/v1/completions", prompt="Once upon", temperature=0)
    ids = [tokenizer.end_of_text, *tokenizer.encode("Once upon")]
    assert got["choices"][0]["text"] == "".join(Answer(model, tokenizer, ids, max_tokens=20, temperature=0))
    assert got["object"] == "text_completion"


def test_a_stream_gives_the_same_in_pieces(port):
    wanted = {"messages": HELLO, "seed": 7, "temperature": 1.5, "top_p": 0.9, "top_k": 100}
    whole = answer(port, **wanted)
    first, *pieces, last, used = events(ask(port, **wanted, stream=True, stream_options={"include_usage": True}))
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert len(pieces) > 5
    assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == whole["choices"][0]["message"]["content"]
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert (used["choices"], used["usage"]) == ([], whole["usage"])
    assert {p["object"] for p in (first, *pieces, last, used)} == {"chat.completion.chunk"}
    assert "usage" not in events(ask(port, **wanted, stream=True))[-1]
    assert answer(port, **{**wanted, "seed": 8})["choices"] != whole["choices"]


def test_stop_texts_end_an_answer_and_are_never_sent(port):
    text = answer(port, messages=HELLO, temperature=0)["choices"][0]["message"]["content"]
    for stop in (text[9:14], text[9:10], [text[12:30], "never said", text[10:13]], text[-2:]):
        stops = [stop] if isinstance(stop, str) else stop
        expected = text[: min(i for i in map(text.find, stops) if i >= 0)]
        got = answer(port, messages=HELLO, temperature=0, stop=stop)
        assert got["choices"][0]["message"]["content"] == expected
        assert got["choices"][0]["finish_reason"] == "stop"
        streamed = events(ask(port, messages=HELLO, temperature=0, stop=stop, stream=True))
        assert "".join(e["choices"][0]["delta"].get("content", "") for e in streamed) == expected


def test_the_oldest_turns_are_left_out_whole(tokenizer):
    turns = [("system", "Be kind."), *[("user" if i % 2 == 0 else "assistant", f"This is turn {i}") for i in range(41)]]
    ids, left_out = fit(tokenizer, turns, block_size=200, answer=50)
    assert len(ids) + 50 <= 200
    assert left_out % 2 == 0  # never an answer without its question
    assert ids == tokenizer.render([turns[0], *turns[1 + left_out :]], reply=True)
    assert len(tokenizer.render([turns[0], *turns[1 + left_out - 2 :]], reply=True)) + 50 > 200
    assert fit(tokenizer, turns, block_size=10_000, answer=50) == (tokenizer.render(turns, reply=True), 0)
    with pytest.raises(TooLong, match="shorten"):
        fit(tokenizer, [*turns, ("user", "word " * 300)], block_size=200, answer=50)


# ---- refusals -------------------------------------------------------------------------------------------------------

BAD = {
    "not JSON": ({"raw": "{"}, 400, None, None),
    "no object": ({"raw": "[]"}, 400, None, None),
    "another model": ({"messages": HELLO, "model": "gpt-4"}, 404, "model", "model_not_found"),
    "no messages": ({}, 400, "messages", None),
    "an unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0]", None),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content", None),
    "two answers": ({"messages": HELLO, "n": 2}, 400, "n", "unsupported_parameter"),
    "tools": ({"messages": HELLO, "tools": [{}]}, 400, "tools", "unsupported_parameter"),
    "temperature": ({"messages": HELLO, "temperature": -1}, 400, "temperature", None),
    "top_p": ({"messages": HELLO, "top_p": "0.5"}, 400, "top_p", None),
    "true is no number": ({"messages": HELLO, "seed": True}, 400, "seed", None),
    "stop": ({"messages": HELLO, "stop": [""]}, 400, "stop", None),
    "stream": ({"messages": HELLO, "stream": "yes"}, 400, "stream", None),
    "too long": ({"messages": [{"role": "user", "content": "a long word " * BLOCK}]}, 400, None, "context_length_exceeded"),
    "too large": ({"raw": b" " * (serve.MOST_BYTES + 1)}, 413, None, None),
    "a form": ({"messages": HELLO, "headers": {"Content-Type": "text/plain"}}, 415, None, None),
    "a path": ({"path": "/v1/nothing"}, 404, None, None),
    "a method": ({"method": "GET"}, 405, None, None),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_is_refused_in_openais_shape(port, case):
    request, status, param, code = BAD[case]
    response = ask(port, **request)
    error = json.load(response)["error"]
    assert (response.status, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert "\n" not in error["message"]


def test_what_changes_nothing_is_accepted():
    """As chat pages send it: nulls, defaults, a list of text parts, OpenAI's newer names."""
    body = {"model": "m", "n": 1, "tools": [], "stop": None, "user": "me", "frequency_penalty": 0, "temperature": None,
            "max_completion_tokens": 7, "messages": [{"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " kind"}]}]}  # fmt: skip
    asked = read_request(json.dumps(body).encode(), chat=True)
    assert (asked.turns, asked.max_tokens, asked.sampling) == ([("system", "Be kind")], 7, {})
    with pytest.raises(ApiError):
        read_request(b"[" * 100_000, chat=True)


def test_a_key_is_asked_for_and_a_foreign_name_refused(model, tokenizer, port):
    with serving(model, tokenizer, api_key="sésame") as locked:
        for given in (None, "Bearer", "Bearer sesame", "Basic sésame", "Bearer sésame2"):
            headers = {"Authorization": given.encode()} if given else {}
            response = ask(locked, "/v1/models", method="GET", headers=headers)
            assert (response.status, json.load(response)["error"]["code"]) == (401, "invalid_api_key")
            assert ask(locked, messages=HELLO, headers=headers).status == 401
        assert (
            ask(locked, "/v1/models", method="GET", headers={"Authorization": "Bearer sésame".encode()}).status == 200
        )
        assert ask(locked, "/", method="GET").status == 200  # the page asks for the key itself
    assert ask(port, "/v1/models", method="GET", headers={"Host": "rebound.example"}).status == 400


# ---- one after the other --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_the_model(model, port, capsys, stream):
    capsys.readouterr()
    asked = 0  # for the next token

    def count(*_):
        nonlocal asked
        asked += 1

    hook = model.wte.register_forward_pre_hook(count)
    body = {"messages": HELLO, "max_tokens": BLOCK, "temperature": 0}
    if stream:
        response = ask(port, **body, stream=True)
        assert response.read(10)
        response.connection.close()
        response.close()
    else:
        raw = json.dumps({"model": "mini", **body}).encode()
        with socket.create_connection(("127.0.0.1", port)) as s:
            s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                      b"Content-Length: %d\r\n\r\n%s" % (len(raw), raw))  # fmt: skip
            time.sleep(0.1)
    said, until = "", time.monotonic() + 20
    while not said and time.monotonic() < until:
        said = capsys.readouterr().err
        time.sleep(0.02)
    assert re.search(r"\+ (\d+) tokens in .*: the client left", said)
    time.sleep(0.1)
    then = asked
    time.sleep(0.2)
    hook.remove()
    assert then == asked < 900  # of about 1,000
    assert answer(port, messages=HELLO, max_tokens=1)["usage"]["completion_tokens"] == 1


def test_requests_are_answered_one_at_a_time_in_the_order_of_their_coming(model, tokenizer, port):
    running, most, done, lock = 0, 0, [], threading.Lock()

    def enter(*_):
        nonlocal running, most
        running += 1
        most = max(most, running)

    def leave(*_):
        nonlocal running
        running -= 1

    def work(n):
        answer(port, messages=HELLO, max_tokens=30)
        with lock:
            done.append(n)

    hooks = [model.wte.register_forward_pre_hook(enter), model.ln_f.register_forward_hook(leave)]
    try:
        long = ask(port, messages=HELLO, max_tokens=400, stream=True)  # holds its turn while the others come
        threads = [threading.Thread(target=work, args=(n,)) for n in range(5)]
        for thread in threads:
            thread.start()
            time.sleep(0.03)
        assert not done
        events(long)
        for thread in threads:
            thread.join(30)
    finally:
        for hook in hooks:
            hook.remove()
    assert done == [0, 1, 2, 3, 4]
    assert most == 1


def test_a_client_that_does_not_read_holds_nobody_up(port):
    slow = ask(port, messages=HELLO, max_tokens=400, stream=True)
    answer(port, messages=HELLO, max_tokens=5)
    assert len(events(slow)) > 100


# ---- clients that people have ---------------------------------------------------------------------------------------


def test_the_official_client(port):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    assert [m.id for m in client.models.list()] == ["mini"]
    wanted = {"model": "mini", "messages": HELLO, "max_tokens": 12, "seed": 4, "stop": ["@@"]}
    whole = client.chat.completions.create(**wanted)
    assert whole.usage.completion_tokens == 12
    streamed = list(client.chat.completions.create(**wanted, stream=True, extra_body={"top_k": 50}))
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == whole.choices[0].message.content
    assert streamed[-1].choices[0].finish_reason == "length"
    assert client.completions.create(model="mini", prompt="Once", max_tokens=3).choices[0].text
    with pytest.raises(openai.NotFoundError, match="is not here"):
        client.chat.completions.create(**{**wanted, "model": "gpt-4"})
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(**wanted, temperature=9)


# ---- the program ----------------------------------------------------------------------------------------------------


def test_the_program_serves_a_run_until_it_is_told_to_stop(data, tmp_path):
    run = tmp_path / "my-run"
    assert train("--data", data, "--out", run, "--steps", 1, *SMALL) == 0
    process = start("scripts/serve.py", "--run", run, "--port", 0, "--device", "cpu", stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT)  # fmt: skip
    lines = [process.stdout.readline() for _ in range(3)]
    port = int(re.search(r"page +http://127\.0\.0\.1:(\d+)/", lines[1])[1])
    assert answer(port, messages=HELLO, model="my-run", max_tokens=3)["usage"]["completion_tokens"] <= 3
    assert f"--port {port}: cannot listen there" in error_of(serve.main, ["--run", str(run), "--port", str(port)])
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert "Traceback" not in out
    assert "Hello there" not in out
