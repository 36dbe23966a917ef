"""arch="modern" is transformers' Qwen3: its logits, initial weights, positions, cache and counts."""

import math

import pytest
import torch
from torch.nn import functional as F

from gpt.errors import GPTError
from gpt.hf import to_hf
from gpt.model import GPT, GPTConfig, flops_per_token, parameter_table
from gpt.modern import rotate, rotation
from gpt.presets import PRESETS, preset
from gpt.sample import generate
from tests.test_model import TINY, _one_thread, noisy, random_ids

__all__ = ["_one_thread"]
MODERN = {**TINY, "arch": "modern"}


@pytest.mark.parametrize("shape", [{}, {"tied": True}, {"n_head": 4, "n_embd": 32, "n_ff": 24, "n_layer": 3}], ids=str)
@torch.no_grad()
def test_logits_equal_transformers(shape):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Qwen3ForCausalLM"):
        pytest.skip("transformers below 4.51 has no Qwen3")
    model, ids = noisy(GPTConfig(**{**MODERN, **shape})), random_ids(3, 16)
    kwargs, state = to_hf(model)
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**kwargs)).eval()
    if model.config.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state, strict=True)
    logits = model(ids)
    assert logits.std() > 0.5  # else equality would say little
    assert (logits - theirs(ids).logits).abs().max() < 1e-4


def test_a_rotated_product_depends_on_the_distance_alone():
    q, k = torch.randn(2, 1, 12, 1, 8)  # two of (B, T, H, D)
    q, k = q[:, :1].expand_as(q), k[:, :1].expand_as(k)  # the same query and key at every position
    angles = rotation(torch.arange(12), 8)
    scores = rotate(q, angles).flatten(1, 2)[0] @ rotate(k, angles).flatten(1, 2)[0].T  # (T, T)
    for distance in range(-11, 12):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[0, 0], (q[0, 0] * k[0, 0]).sum())  # of distance 0 it is the plain product
    assert scores[0].std() > 0.1
    assert rotate(q.bfloat16(), angles).dtype == torch.bfloat16


@torch.no_grad()
def test_no_position_sees_a_later_one_and_order_matters():
    model, ids = noisy(GPTConfig(**MODERN)), random_ids(1, 12)
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 61
    difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert difference[:7].max() == 0
    assert difference[7:].min() > 0
    swapped = ids[:, [1, 0, *range(2, 12)]]
    assert (model(ids) - model(swapped))[0, 2:].abs().max() > 1e-3


@torch.no_grad()
def test_large_queries_and_keys_change_nothing():
    """What QK-norm is for: the length of a query or key cannot grow the logits."""
    model, ids = noisy(GPTConfig(**MODERN)), random_ids(2, 12)
    before = model(ids)
    for block in model.blocks:
        block.attn.qkv.weight[:32] *= 1000
    torch.testing.assert_close(model(ids), before, rtol=1e-3, atol=1e-3)


def test_it_begins_near_the_uniform_guess_with_gains_of_one_and_no_bias():
    torch.manual_seed(0)
    model, ids = GPT(GPTConfig(**MODERN)), random_ids(4, 16)
    assert model(ids, ids.flip(0)).item() == pytest.approx(math.log(61), abs=0.05)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3.0)
    model.reset_parameters()
    assert all((p == 1).all() for p in model.parameters() if p.ndim == 1)
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())


def test_loss_and_gradients_equal_cross_entropy_of_the_logits():
    model, ids, targets = noisy(GPTConfig(**MODERN)), random_ids(4, 16), random_ids(4, 16).flip(0)
    parameters = list(model.parameters())
    plain = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(plain, parameters)
    value = model(ids, targets)
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(value, parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(dtype):
    model, ids = noisy(GPTConfig(**MODERN)), random_ids(2, 8)
    with torch.autocast("cpu", dtype):
        value = model(ids, ids)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(model(ids, ids).item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_it_is_one_graph_and_compiled_once():
    model, ids = noisy(GPTConfig(**MODERN)), random_ids(2, 16)
    torch._dynamo.reset()  # what another test compiled of the same code would make this one's a recompile
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(compiled(ids, ids), model(ids, ids))


def test_the_cache_changes_no_text_of_any_length():
    model = noisy(GPTConfig(**MODERN), noise=0.6)
    prompts = [[1, 2, 3], [4], list(range(5, 18))]
    plain, cached = (
        generate(model, prompts, max_tokens=24, temperature=0.0, use_cache=cache) for cache in (False, True)
    )
    assert plain == cached
    assert len(set(plain[0])) > 3


@pytest.mark.parametrize("name", PRESETS)
def test_every_size_has_about_as_many_parameters_as_gpt2s(name):
    gpt2, modern = (preset(name, arch=arch) for arch in ("gpt2", "modern"))
    tables = parameter_table(gpt2), parameter_table(modern)
    inside = [sum(t[part] for part in ("attn", "mlp", "norm")) for t in tables]
    assert inside[1] == pytest.approx(inside[0], rel=0.06)
    assert tables[1]["wpe"] == 0
    assert modern.ff_width % 64 == 0
    with torch.device("meta"):
        assert GPT(modern).num_params() == sum(tables[1].values())


def test_flops_worked_by_hand():
    config = GPTConfig(vocab_size=10, block_size=8, n_layer=1, n_head=1, n_embd=4, n_ff=6, arch="modern")
    # qkv, proj, gate + up + down, three norms, gains of queries and keys, head
    multiplied = 4 * 12 + 4 * 4 + 3 * 4 * 6 + 3 * 4 + 2 * 4 + 10 * 4
    assert flops_per_token(config) == 6 * multiplied + 12 * 1 * 4 * 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"arch": "gpt3"}, "arch='gpt3': expected gpt2 or modern"),
        ({"arch": "modern", "n_embd": 10, "n_head": 2}, "heads 5 wide .* cannot be rotated: choose an even width"),
    ],
)
def test_wrong_values_are_one_clear_line(fields, message):
    with pytest.raises(GPTError, match=message):
        GPTConfig(**fields)
