"""Decoding on a CPU: single rows are spread over the cores, for the same numbers."""

import copy

import pytest
import torch
from torch.nn import functional as F

from gpt.decoding import RowLinear, lay_out_for_decoding, linear
from gpt.model import GPTConfig
from gpt.sample import generate
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
