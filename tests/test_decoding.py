"""Decoding faster, for the same ids: single rows spread over a CPU's cores; a compiled graph."""

import copy

import pytest
import torch
from torch.nn import functional as F

from gpt.cache import KVCache
from gpt.compiled import CompiledCache, cache_for, compile_decoding
from gpt.decoding import RowLinear, lay_out_for_decoding, linear
from gpt.model import GPTConfig
from gpt.sample import generate, stream
from tests.test_model import TINY, noisy
from tests.test_sample import MODEL, RAGGED


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize(("out", "inputs"), [(96, 32), (32, 96), (97, 33), (1, 7), (7, 1)])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (3,), (1, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_torchs_linear(threads, out, inputs, shape, bias):
    x, by_rows = torch.randn(*shape, inputs), torch.randn(out, inputs)
    b = torch.randn(out) if bias else None
    for weight in (by_rows, by_rows.t().contiguous().t()):
        torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b))


def test_single_rows_are_split_among_the_cores_where_no_gradient_is_asked_for(threads, monkeypatch):
    splits = []
    inner = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: (splits.append(len(a)), inner(a, b))[1])
    x, weight = torch.randn(1, 60), torch.randn(120, 60, requires_grad=True)
    assert linear(x, weight).requires_grad
    assert splits == []
    with torch.no_grad():
        linear(x, weight)
        linear(x, weight.detach().t().contiguous().t())
        linear(torch.randn(2, 60), weight)
        linear(x.double(), weight.double())
    assert splits == ([] if threads == 1 else [threads, threads])


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
@pytest.mark.parametrize("tied", [True, False])
def test_laid_out_for_decoding_it_is_the_same_model(threads, arch, tied):
    model = noisy(GPTConfig(**TINY | {"arch": arch, "tied": tied}), noise=0.6)
    laid_out = lay_out_for_decoding(copy.deepcopy(model))
    assert not laid_out.blocks[0].mlp.up.weight.is_contiguous()
    assert laid_out.blocks[0].mlp.down.weight.is_contiguous()
    assert isinstance(laid_out.blocks[0].attn.qkv, RowLinear)
    for (name, a), (other, b) in zip(laid_out.state_dict().items(), model.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    for prompts in ([RAGGED[0]], RAGGED):
        assert generate(laid_out, prompts, max_tokens=20, temperature=0) == generate(
            model, prompts, max_tokens=20, temperature=0
        )


def test_other_formats_are_left_alone():
    model = copy.deepcopy(MODEL).to(torch.bfloat16)
    assert lay_out_for_decoding(model) is model
    assert not any(isinstance(m, RowLinear) for m in model.modules())


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_compiled_decoding_gives_the_same_ids(arch, device):
    """Ragged prompts, windows that move, rows that end at different times and others that go on without them."""
    model = noisy(GPTConfig(**TINY | {"arch": arch}), noise=0.6).to(device)
    compiled = compile_decoding(copy.deepcopy(model), batch=len(RAGGED))
    free = generate(model, RAGGED, max_tokens=40, temperature=0)
    stop = max(range(TINY["vocab_size"]), key=lambda i: len({(*text, i).index(i) for text in free}))
    assert len({len(text) for text in generate(model, RAGGED, max_tokens=40, temperature=0, stop_ids=[stop])}) > 2
    for settings in ({"temperature": 0}, {"temperature": 0, "stop_ids": [stop]}, {"seed": 3, "top_k": 5}):
        assert generate(compiled, RAGGED, max_tokens=40, **settings) == generate(
            model, RAGGED, max_tokens=40, **settings
        )


def test_the_graph_is_compiled_once_and_all_single_steps_are_its(monkeypatch):
    model = compile_decoding(copy.deepcopy(MODEL))
    torch._dynamo.utils.counters.clear()
    used, inner = [], CompiledCache.decode_one_token
    monkeypatch.setattr(CompiledCache, "decode_one_token", lambda self, ids: (used.append(1), inner(self, ids))[1])
    for prompt in RAGGED:
        assert generate(model, [prompt], max_tokens=30, temperature=0) == generate(
            MODEL, [prompt], max_tokens=30, temperature=0
        )
    assert len(used) > 4 * len(RAGGED)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_two_texts_at_a_time_do_not_share_the_cache():
    model = compile_decoding(copy.deepcopy(MODEL))
    alone = [generate(MODEL, [prompt], max_tokens=12, temperature=0)[0] for prompt in RAGGED[:2]]
    a, b = (stream(model, prompt, max_tokens=12, temperature=0) for prompt in RAGGED[:2])
    assert [list(text) for text in zip(*zip(a, b, strict=True), strict=True)] == alone
    with cache_for(model, 1) as cache:
        assert cache is model.compiled_cache  # given back
        with cache_for(model, 1) as other:
            assert type(other) is KVCache
    with cache_for(model, 2) as other:
        assert type(other) is KVCache
    half_read = stream(model, RAGGED[0], max_tokens=12, temperature=0)
    next(half_read)
    half_read.close()
    with cache_for(model, 1) as cache:
        assert cache is model.compiled_cache
