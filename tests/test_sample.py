"""Sampling: the choice of an id, and text that does not depend on cache, company in the batch, or training."""

import itertools
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt.cache import KVCache
from gpt.errors import GPTError
from gpt.model import GPT, GPTConfig
from gpt.sample import (
    context_start,
    decode_one_token,
    generate,
    pick_next,
    prefill,
    stream,
)
from tests.test_model import TINY, noisy, random_ids, reference

MODEL = noisy(GPTConfig(**TINY), noise=0.6)  # strong enough that greedy text is lively, not one id repeated
RAGGED = [random_ids(n, seed=n).tolist() for n in (5, 1, 16, 9, 40)]  # block_size is 16


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small only wait for each other's threads, seconds long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(probs: list[float], n: int = 4000, **how) -> list[float]:
    """How often each id is picked from these probabilities."""
    logits = torch.tensor(probs).log().expand(n, -1)
    return (pick_next(logits, generator=rng(), **how).bincount(minlength=len(probs)) / n).tolist()


def test_greedy_equals_transformers():
    theirs = reference(MODEL)
    for prompt in RAGGED[:2]:
        out = theirs.generate(torch.tensor([prompt]), max_new_tokens=16 - len(prompt), do_sample=False, pad_token_id=0)
        assert generate(MODEL, [prompt], max_tokens=16 - len(prompt), temperature=0) == [out[0, len(prompt) :].tolist()]


def test_repetition_penalty_equals_transformers():
    how = {"max_new_tokens": 11, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.7}
    out = reference(MODEL).generate(torch.tensor([RAGGED[0]]), **how)[0, 5:].tolist()
    assert generate(MODEL, RAGGED[:1], max_tokens=11, temperature=0, repetition_penalty=1.7) == [out]
    assert generate(MODEL, RAGGED[:1], max_tokens=11, temperature=0) != [out]


def by_definition(prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy text written out: no cache, no batch, no loop of ours."""
    text = list(prompt)
    for _ in range(max_tokens):
        window = text[context_start(len(text), 16) :]
        text.append(MODEL(torch.tensor([window]))[0, -1].argmax().item())
    return text[len(prompt) :]


@pytest.mark.parametrize("use_cache", [True, False])
def test_ragged_batch_past_the_block_equals_each_row_alone(use_cache):
    together = generate(MODEL, RAGGED, max_tokens=45, temperature=0, use_cache=use_cache)
    assert together == [by_definition(prompt, 45) for prompt in RAGGED]
    assert len({tuple(text) for text in together}) == len(RAGGED)  # five different texts: the equality says something


@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
def test_sampled_text_is_equal_with_and_without_cache(block_size):
    model = noisy(GPTConfig(**{**TINY, "block_size": block_size}))
    how = {"max_tokens": 20, "seed": 3, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2}
    assert generate(model, RAGGED, **how) == generate(model, RAGGED, **how, use_cache=False)


def test_the_cache_saves_forward_work(monkeypatch):
    widths, hidden = [], MODEL.hidden
    monkeypatch.setattr(MODEL, "hidden", lambda ids, cache: widths.append(ids.shape[1]) or hidden(ids, cache=cache))
    generate(MODEL, [[1, 2, 3]], max_tokens=20, temperature=0)
    assert widths == [3, *[1] * 13, 9, *[1] * 5]  # full at 16 ids: the 17th leaves a window of 9


def test_context_start_worked_by_hand():
    assert [context_start(n, 16) for n in (1, 16, 17, 24, 25, 32, 33)] == [0, 0, 8, 8, 16, 16, 24]


@given(length=st.integers(1, 10_000), block_size=st.integers(1, 300))
def test_context_is_the_longest_that_fits_on_the_half_block_grid(length, block_size):
    start, half = context_start(length, block_size), max(1, block_size // 2)
    assert start % half == 0
    assert 1 <= length - start <= block_size
    assert start == 0 or length - (start - half) > block_size


@torch.no_grad()
def test_cache_steps_equal_one_forward():
    ids = random_ids(2, 10)
    cache = KVCache(MODEL.config, 2, dtype=torch.float32, device=torch.device("cpu"))
    whole = MODEL(ids)
    torch.testing.assert_close(MODEL(ids[:, :4], cache=cache), whole[:, :4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(MODEL(ids[:, 4:9], cache=cache), whole[:, 4:9], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decode_one_token(MODEL, ids[:, 9], cache), whole[:, 9], rtol=1e-4, atol=1e-5)
    with pytest.raises(GPTError, match=r"10 \+ 7 positions exceed the cache's 16"):
        MODEL(random_ids(2, 7), cache=cache)
    torch.testing.assert_close(prefill(MODEL, [[1], [2, 3]], cache)[1], MODEL(torch.tensor([[2, 3]]))[0, 1])


@pytest.mark.parametrize("use_cache", [True, False])
def test_stop_ids_end_their_row_only_and_are_not_returned(use_cache):
    free = generate(MODEL, RAGGED, max_tokens=30, temperature=0)

    def cut(stop: int) -> list[list[int]]:
        return [list(itertools.takewhile(lambda new: new != stop, text)) for text in free]

    late = max(range(61), key=lambda stop: len({len(text) for text in cut(stop)}))
    assert len({len(text) for text in cut(late)}) > 2  # the rows stop at different times
    at_once = free[0][0]
    assert cut(at_once)[0] == []
    for stop in (late, at_once):
        texts = generate(MODEL, RAGGED, max_tokens=30, temperature=0, stop_ids=[stop], use_cache=use_cache)
        assert texts == cut(stop)


def test_stream_gives_the_same_ids_one_by_one():
    how = {"max_tokens": 25, "seed": 5, "top_k": 10}
    ids = stream(MODEL, RAGGED[0], **how)
    assert iter(ids) is ids
    first = next(ids)
    assert torch.is_grad_enabled()  # between two ids the caller's modes are its own
    assert [first, *ids] == generate(MODEL, RAGGED[:1], **how)[0]


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    how = {"max_tokens": 12, "top_k": 20}
    assert generate(MODEL, RAGGED, seed=1, **how) == generate(MODEL, RAGGED, seed=1, **how)
    assert generate(MODEL, RAGGED, seed=1, **how) != generate(MODEL, RAGGED, seed=2, **how)
    assert generate(MODEL, RAGGED, **how) != generate(MODEL, RAGGED, **how)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampling_midway_leaves_training_as_it_was():
    model = GPT(GPTConfig(**TINY, dropout=0.3)).train()
    model.blocks[1].eval()
    flags = [module.training for module in model.modules()]
    how = {"max_tokens": 20, "temperature": 0}
    assert generate(model, RAGGED, **how) == generate(model, RAGGED, **how)  # dropout was off
    next(stream(model, RAGGED[0], max_tokens=2))
    assert [module.training for module in model.modules()] == flags
    with torch.no_grad():
        model.wte.weight[3] = math.nan
    with pytest.raises(GPTError, match="training diverged"):
        generate(model, [[3]], max_tokens=1)
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tied", [False, True])
def test_under_autocast_and_in_half_precision(tied):
    model = noisy(GPTConfig(**TINY, tied=tied))
    with torch.autocast("cpu", torch.bfloat16):
        assert [len(text) for text in generate(model, RAGGED, max_tokens=20)] == [20] * 5
    assert [len(text) for text in generate(model.bfloat16(), RAGGED, max_tokens=20)] == [20] * 5


def test_nothing_to_do():
    assert generate(MODEL, [], max_tokens=5) == []
    assert generate(MODEL, [[1], [2]], max_tokens=0) == [[], []]


def test_pick_next_worked_by_hand():
    probs = [0.15, 0.5, 0.05, 0.3]
    near = {"abs": 0.03}
    assert drawn(probs) == pytest.approx(probs, **near)
    assert drawn(probs, temperature=0) == [0, 1, 0, 0]
    assert drawn(probs, temperature=1e-30) == [0, 1, 0, 0]
    assert drawn(probs, top_k=2) == pytest.approx([0, 5 / 8, 0, 3 / 8], **near)
    assert drawn(probs, top_p=0.81) == pytest.approx([15 / 95, 50 / 95, 0, 30 / 95], **near)  # 0.5 + 0.3 < 0.81
    assert drawn(probs, top_p=0.79) == pytest.approx([0, 5 / 8, 0, 3 / 8], **near)
    assert drawn(probs, temperature=0.5) == pytest.approx([p * p / 0.365 for p in probs], **near)
    logits, seen = torch.tensor([[2.0, 1.5, -1.0]]), torch.tensor([[True, False, True]])
    assert pick_next(logits, temperature=0, repetition_penalty=2.0, seen=seen).tolist() == [1]  # 1, 1.5, -2


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(LOGITS, st.integers(1, 15), st.integers(0, 99))
def test_top_k_picks_among_the_k_best(logits, k, seed):
    row = torch.tensor([logits])
    picked = pick_next(row, generator=rng(seed), top_k=k).item()
    assert (row > row[0, picked]).sum() < k


@settings(max_examples=60, deadline=None)
@example([1.0, -1.1382392969641795e-19, 0.0], 0.75, 0)
@given(LOGITS, st.floats(0.01, 1.0), st.integers(0, 99))
def test_top_p_picks_only_what_the_better_ids_left_short_of_p(logits, p, seed):
    row = torch.tensor([logits])
    picked = pick_next(row, generator=rng(seed), top_p=p).item()
    likely = row.softmax(-1)  # logits that differ by less than it can tell are equally good
    better = likely.double()[likely > likely[0, picked]].sum().item()
    assert better < p + 1e-5


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"prompt_ids": []}, "prompt 0 is empty"),
        ({"prompt_ids": [3, 61]}, "prompt 0 has ids from 3 to 61, the model knows 0 to 60"),
    ],
)
def test_wrong_requests_are_one_clear_line(how, message):
    request = {"prompt_ids": [1], "max_tokens": 3, **how}
    with pytest.raises(GPTError, match=message):
        stream(MODEL, **request)  # at once, not at the first id
    with pytest.raises(GPTError, match=message):
        generate(MODEL, [request.pop("prompt_ids")], **request)
