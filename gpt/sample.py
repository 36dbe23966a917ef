"""Text from a model, one id at a time: how the next id is chosen, the KV cache, and the loop around them.

A text longer than block_size is seen through a window that begins at a function of its length alone
(`context_start`), so the result is the same with and without a cache, and however a text was begun.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

from gpt.cache import KVCache
from gpt.compiled import CompiledCache, cache_for
from gpt.decoding import linear
from gpt.errors import GPTError
from gpt.model import GPT


def pick_next(
    logits: Tensor,
    *,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
) -> Tensor:
    """The next id of each row: logits (B, V) -> (B,) int64.

    Applied in transformers' order: repetition penalty, temperature (0 is greedy), top-k, top-p. seen: (B, V) bool,
    the ids the penalty applies to (CTRL, arXiv:1909.05858, section 4.1). top_p keeps the fewest ids whose
    probability reaches p (Holtzman et al., arXiv:1904.09751), at least one. GPTError for logits that are not finite.
    """
    logits = logits.float()
    if seen is not None and repetition_penalty != 1.0:
        punished = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, punished, logits)
    best, greedy = logits.max(dim=-1, keepdim=True)  # (B, 1); carries a NaN through
    if not torch.isfinite(best).all():  # on a GPU multinomial would answer with a device assert, which ends the process
        raise GPTError("the model's logits are not finite: its training diverged; use an earlier checkpoint")
    if temperature == 0:
        return greedy.squeeze(-1)
    logits = (logits - best) / temperature  # best first: a tiny temperature then cannot overflow to inf
    if top_k is None and top_p is None:
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    k = logits.shape[-1] if top_k is None else min(top_k, logits.shape[-1])
    logits, ids = logits.topk(k)  # (B, k) both, best first
    probs = logits.softmax(-1)
    if top_p is not None:
        mass_before = probs.cumsum(-1) - probs
        mass_before[:, 0] = 0.0  # rounding must not cost a row its best id
        probs = probs.masked_fill(mass_before >= top_p, 0.0)  # multinomial normalises what is left
    return ids.gather(-1, torch.multinomial(probs, 1, generator=generator)).squeeze(-1)


def prefill(model: GPT, prompts: Sequence[Sequence[int]], cache: KVCache | None = None) -> Tensor:
    """Logits (B, V) after the last id of each prompt, of any lengths up to block_size; refills the cache if given."""
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    # Padding goes to the right: a causal model cannot see it from the ids before it.
    padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
    device = model.wte.weight.device
    if cache is not None:
        cache.truncate([0] * len(prompts))
    x = model.hidden(torch.tensor(padded, device=device), cache=cache)  # (B, T, C)
    if cache is not None:
        cache.truncate(lengths)
    last = x[torch.arange(len(prompts), device=device), torch.tensor(lengths, device=device) - 1]  # (B, C)
    return linear(last, model.head_weight)  # (B, V)


def decode_one_token(model: GPT, ids: Tensor, cache: KVCache) -> Tensor:
    """Logits (B, V) after one more id per row, ids (B,); the cache grows by one position."""
    if isinstance(cache, CompiledCache):
        return cache.decode_one_token(ids)
    x = model.hidden(ids[:, None], cache=cache)  # (B, 1, C)
    return linear(x[:, 0], model.head_weight)


def context_start(length: int, block_size: int) -> int:
    """Where the window over a text of this length begins: 0, and half a block further whenever it is full."""
    if length <= block_size:
        return 0
    half = max(1, block_size // 2)
    return math.ceil((length - block_size) / half) * half


def generate(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
    seed: int | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Up to max_tokens new ids for each prompt, ending before the first of stop_ids.

    Prompts may differ in length and exceed block_size; none may be empty. The same seed gives the same text on the
    same machine; seed=None draws a fresh one. Torch's global generators are neither read nor advanced, and every
    module's training flag is put back, so a training loop may sample midway. GPTError for settings that make no sense.
    """
    texts: list[list[int]] = [[] for _ in prompts]
    choice = _choice(temperature, top_k, top_p, repetition_penalty)
    for step in _steps(model, prompts, max_tokens, choice, stop_ids, seed, use_cache):
        for row, new in step.items():
            texts[row].append(new)
    return texts


def stream(
    model: GPT,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop_ids: Sequence[int] = (),
    seed: int | None = None,
    use_cache: bool = True,
) -> Iterator[int]:
    """The ids that generate gives for this one prompt, each as soon as it is known; wrong settings raise at once."""
    choice = _choice(temperature, top_k, top_p, repetition_penalty)
    steps = _steps(model, [prompt_ids], max_tokens, choice, stop_ids, seed, use_cache)
    return (step[0] for step in steps)


def _choice(temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float) -> dict:
    """The checked settings of pick_next."""
    if not (_is_number(temperature) and 0 <= temperature < math.inf):
        raise GPTError(f"temperature={temperature!r}: expected 0 (greedy) or a positive number")
    if top_k is not None and not (_is_whole(top_k) and top_k >= 1):
        raise GPTError(f"top_k={top_k!r}: expected a whole number of 1 or more, or None for no limit")
    if top_p is not None and not (_is_number(top_p) and 0 < top_p <= 1):
        raise GPTError(f"top_p={top_p!r}: expected a number above 0 and up to 1, or None for no limit")
    if not (_is_number(repetition_penalty) and 0 < repetition_penalty < math.inf):
        raise GPTError(f"repetition_penalty={repetition_penalty!r}: expected a positive number, 1.0 for none")
    return dict(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)  # noqa: C408


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _steps(model, prompts, max_tokens, choice, stop_ids, seed, use_cache) -> Iterator[dict[int, int]]:
    """Check the request now; then one {row: new id} per step, without the rows that have stopped."""
    if not (_is_whole(max_tokens) and max_tokens >= 0):
        raise GPTError(f"max_tokens={max_tokens!r}: expected a whole number of 0 or more")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise GPTError(f"prompt {row} is empty: begin it with at least one id, such as <|endoftext|>")
        if not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise GPTError(
                f"prompt {row} has ids from {min(prompt)} to {max(prompt)}, the model knows 0 to "
                f"{model.config.vocab_size - 1}: encode it with the tokenizer the model was trained with"
            )
    return _decode(model, [list(map(int, prompt)) for prompt in prompts], max_tokens, choice, stop_ids, seed, use_cache)


@torch.no_grad()  # wraps the generator step by step: gradients are on again for whoever consumes it
def _decode(model, texts, max_tokens, choice, stop_ids, seed, use_cache) -> Iterator[dict[int, int]]:
    weight = model.wte.weight
    generator = torch.Generator(weight.device)
    _ = generator.seed() if seed is None else generator.manual_seed(seed)
    live = list(range(len(texts)))  # the rows still growing; cache and seen have only these
    seen = torch.zeros(len(texts), model.config.vocab_size, dtype=torch.bool, device=weight.device)
    for row, text in enumerate(texts):
        seen[row, text] = True
    with cache_for(model, len(texts)) if use_cache and texts else nullcontext() as cache:
        starts: list[int] = []  # the windows that the cache holds
        for _ in range(max_tokens):
            if not live:
                return
            previous, starts = starts, [context_start(len(texts[row]), model.config.block_size) for row in live]
            with _evaluating(model):
                if cache is not None and starts == previous:
                    newest = torch.tensor([texts[row][-1] for row in live], device=weight.device)
                    logits = decode_one_token(model, newest, cache)
                else:  # a window moved: every position number in it changes, so its keys do too
                    logits = prefill(model, [texts[row][s:] for row, s in zip(live, starts, strict=True)], cache)
            picked = pick_next(logits, generator=generator, seen=seen, **choice)
            new = dict(zip(live, picked.tolist(), strict=True))
            seen.scatter_(1, picked[:, None], True)
            going = [i for i, row in enumerate(live) if new[row] not in stop_ids]
            if len(going) < len(live):
                live, starts = [live[i] for i in going], [starts[i] for i in going]
                if not live:
                    return
                seen = seen[going]
                if cache is not None:
                    cache.keep_rows(going)
            for row in live:
                texts[row].append(new[row])
            yield {row: new[row] for row in live}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside; afterwards every module's own training flag as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
