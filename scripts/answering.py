"""An answer as it is made: which turns of a conversation the model gets to see, its text piece by piece, where it ends."""

from collections.abc import Iterator, Sequence

from gpt.errors import GPTError
from gpt.model import GPT
from gpt.sample import stream
from gpt.tokenizer import TextStream, Tokenizer


class TooLong(GPTError):
    """What is asked does not fit into the model's context by itself."""


def fit(
    tokenizer: Tokenizer, turns: Sequence[tuple[str, str]], *, block_size: int, answer: int
) -> tuple[list[int], int]:
    """(ids of the conversation up to `<|assistant|>`, how many turns were left out).

    The oldest turns are left out, each whole, until an answer of `answer` tokens, at most half of the context, fits in
    too; never system messages at the beginning, never the last turn. Raises TooLong where these alone fill the context.
    """
    turns = list(turns)
    first = next((i for i, (role, _) in enumerate(turns) if role != "system"), len(turns))
    lengths = [len(tokenizer.encode(text)) + 2 for _, text in turns]  # with its <|role|> and <|end|>
    room = block_size - min(answer, block_size // 2) - 2  # <|endoftext|> and <|assistant|>
    cut = first
    while sum(lengths[:first] + lengths[cut:]) > room and cut < len(turns) - 1:
        cut += 1
        while turns[cut][0] == "assistant" and cut < len(turns) - 1:  # an answer without its question tells nothing
            cut += 1
    ids = tokenizer.render([*turns[:first], *turns[cut:]], reply=True)
    if len(ids) >= block_size:
        raise TooLong(f"this is {len(ids)} tokens long, the model's context {block_size}: shorten it")
    return ids, cut - first


class Answer:
    """What follows `ids`: iterate over it for the text, then `tokens` and `finish` tell how long it is and why it ended.

    `stop`: texts before which it ends. Raises GPTError at once for settings that make no sense.
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, ids: Sequence[int], *, max_tokens: int, stop: Sequence[str] = (),
        **sampling: float | int | None,
    ) -> None:  # fmt: skip
        self.tokenizer, self.max_tokens, self.stop = tokenizer, max_tokens, stop
        self.tokens, self.finish = 0, ""
        ends = (tokenizer.end_of_turn, tokenizer.end_of_text)
        self.ids = stream(model, ids, max_tokens=max_tokens, stop_ids=ends, **sampling)

    def __iter__(self) -> Iterator[str]:
        text, held = TextStream(self.tokenizer), ""
        for token in self.ids:
            self.tokens += 1
            held += text.push(token)
            found = [i for i in (held.find(s) for s in self.stop) if i >= 0]
            if found:
                self.finish, held = "stop", held[: min(found)]
                break
            ready = len(held) - unfinished(held, self.stop)
            if ready:
                piece, held = held[:ready], held[ready:]
                yield piece
        else:
            self.finish = "length" if self.tokens == self.max_tokens else "stop"
        if held:
            yield held


def unfinished(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of the texts `stop`."""
    return max((n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0)
