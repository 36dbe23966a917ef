"""OpenAI's HTTP interface as data: what a request's JSON asks of a model, and the JSON it gets. Pure functions.

Reference: https://platform.openai.com/docs/api-reference (chat, completions, models; read November 2026). top_k and
repetition_penalty are additions, named as vLLM and llama.cpp name them. What would change the answer and is not there
(tools, n > 1, logprobs …) is refused; what would not is ignored.
"""

import json
from dataclasses import dataclass
from typing import Any

from store.untrusted import parse_json

MOST_STOPS = 4


class ApiError(Exception):
    """A refusal in OpenAI's shape."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """{"error": …}."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """What a request asks for. Exactly one of `turns` and `prompt` is given."""

    model: str
    turns: list[tuple[str, str]] | None
    prompt: str | None
    max_tokens: int | None
    sampling: dict[str, Any]  # the settings of gpt.sample.stream
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


# name -> (types, least, most) of what is passed on to sampling
SAMPLING: dict[str, tuple[tuple[type, ...], float, float]] = {
    "temperature": ((int, float), 0, 2),
    "top_p": ((int, float), 0, 1),
    "top_k": ((int,), 1, 2**31),
    "repetition_penalty": ((int, float), 0.01, 100),
    "seed": ((int,), -(2**63), 2**63 - 1),
}
# name -> the values that change nothing; None always does not
REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "tools": ([],), "functions": ([],), "logprobs": (False,), "top_logprobs": (0,),
    "echo": (False,), "suffix": ("",), "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (),
}  # fmt: skip
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def read_request(raw: bytes, *, chat: bool) -> Asked:
    """What the body of a POST asks for. Raises ApiError."""
    try:
        body = parse_json(raw)
    except ValueError:
        raise ApiError("the body is not JSON") from None
    if not isinstance(body, dict):
        raise ApiError("the body is no JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    for name, harmless in REFUSED.items():
        if name in body and body[name] not in harmless:
            raise ApiError(f"{name} is not supported here", param=name, code="unsupported_parameter")
    limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    options = _typed(body, "stream_options", dict, {})
    return Asked(
        model=_typed(body, "model", str, ""),
        turns=_turns(body.get("messages")) if chat else None,
        prompt=None if chat else _prompt(body.get("prompt")),
        max_tokens=_number(body, limit, (int,), 1, 2**31),
        sampling={name: _number(body, name, *bounds) for name, bounds in SAMPLING.items() if name in body},
        stop=_stop(body.get("stop")),
        stream=_typed(body, "stream", bool, False),
        include_usage=options.get("include_usage") is True,
    )


def _typed(body: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = body.get(name, default)
    if not isinstance(value, kind):
        raise ApiError(f"{name}: expected {kind.__name__}, found {type(value).__name__}", param=name)
    return value


def _number(body: dict[str, Any], name: str, kinds: tuple[type, ...], least: float, most: float) -> Any:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        whole = "a number" if float in kinds else "a whole number"
        raise ApiError(f"{name}: expected {whole} from {least} to {most}, found {str(value)[:40]}", param=name)
    if name == "top_p" and value == 0:
        raise ApiError("top_p: expected more than 0", param=name)
    return value


def _turns(messages: Any) -> list[tuple[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages: expected a list of at least one message", param="messages")
    turns = []
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ApiError(f"{at}: expected an object with the role {', '.join(ROLES)}", param=at)
        turns.append((ROLES[message["role"]], _text(message.get("content"), at)))
    return turns


def _text(content: Any, at: str) -> str:
    """A message's text: a string, or a list of text parts."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if isinstance(parts, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
        return "".join(p["text"] for p in parts)
    raise ApiError(f"{at}.content: expected text", param=f"{at}.content")


def _prompt(prompt: Any) -> str:
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if not isinstance(prompt, str):
        raise ApiError("prompt: expected one string", param="prompt")
    return prompt


def _stop(stop: Any) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(texts, list) or len(texts) > MOST_STOPS or not all(isinstance(s, str) and s for s in texts):
        raise ApiError(f"stop: expected a text or up to {MOST_STOPS} of them, none empty", param="stop")
    return tuple(texts)


# ---- what is answered -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What all the JSON objects of one answer share."""

    id: str
    created: int  # seconds since 1970
    model: str
    chat: bool

    def whole(self, text: str, finish: str, usage: dict[str, int]) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        kind = "chat.completion" if self.chat else "text_completion"
        return self._object(kind, [{"index": 0, **said, "logprobs": None, "finish_reason": finish}]) | {"usage": usage}

    def piece(self, text: str | None, finish: str | None = None, *, first: bool = False) -> dict[str, Any]:
        """One event of a stream: a piece of text, or (None) how it ended."""
        delta = ({"role": "assistant"} if first else {}) | ({} if text is None else {"content": text})
        said = {"delta": delta} if self.chat else {"text": text or ""}
        return self._object(self._chunk, [{"index": 0, **said, "logprobs": None, "finish_reason": finish}])

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The last event of a stream, where it was asked for."""
        return self._object(self._chunk, []) | {"usage": usage}

    @property
    def _chunk(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens read and made."""
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def event(data: dict[str, Any] | str) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n"
