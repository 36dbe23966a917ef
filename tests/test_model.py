"""The model is GPT-2: its logits, initial weights, loss, dropout and names, with transformers as the reference."""

import math
import shutil

import pytest
import torch
from torch.nn import functional as F

from gpt.errors import GPTError
from gpt.hf import from_hf, to_hf
from gpt.model import GPT, GPTConfig

TINY = {"vocab_size": 61, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
SHAPES = [
    {},
    {"n_head": 4, "n_embd": 32, "n_ff": 24, "n_layer": 3},
    {"tied": True},
    {"qkv_bias": False},
    {"bias": False},
    {"bias": False, "tied": True},
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small only wait for each other's threads, seconds long on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def noisy(config: GPTConfig, noise: float = 0.2) -> GPT:
    """A model whose every parameter matters: no zero biases, no LayerNorm weights of one, far from uniform logits."""
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * noise)
    return model


def random_ids(*shape: int, vocab: int = 61, seed: int = 1) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


def reference(model: GPT):
    """transformers' model with our weights."""
    transformers = pytest.importorskip("transformers")
    kwargs, state = to_hf(model)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**kwargs, bos_token_id=None, eos_token_id=None))
    if kwargs["tie_word_embeddings"]:
        state = {**state, "lm_head.weight": state["transformer.wte.weight"]}
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_logits_equal_transformers(shape):
    model, ids = noisy(GPTConfig(**{**TINY, **shape})), random_ids(3, 16)
    logits = model(ids)
    assert logits.std() > 0.5  # else equality would say little
    assert (logits - reference(model)(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_round_trip_through_transformers_names(shape):
    model, ids = noisy(GPTConfig(**{**TINY, **shape})), random_ids(2, 9)
    theirs = reference(model)
    back = from_hf(theirs.config.to_dict(), theirs.state_dict())
    assert back.config.tied == model.config.tied
    torch.testing.assert_close(back.eval()(ids), model(ids), rtol=1e-5, atol=1e-5)
    again = to_hf(back)[1]
    for name, tensor in to_hf(model)[1].items():
        assert torch.equal(again[name], tensor)
        assert tensor.is_contiguous()


def test_from_hf_reads_bare_names_and_old_mask_buffers():
    model = noisy(GPTConfig(**TINY, tied=True))
    kwargs, state = to_hf(model)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    before = torch.get_rng_state()
    assert torch.equal(from_hf(kwargs, bare)(random_ids(1, 5)), model(random_ids(1, 5)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "relu"}, "activation_function='relu': this model computes only 'gelu_new'"),
        ({"model_type": "llama"}, "only gpt2"),
        ({"n_positions": 8}, "transformer.wpe.weight is .16, 16.: it does not fit this config"),
        ({"n_layer": 3}, "lacks transformer.h.2"),
        ({"n_layer": 1}, "unknown transformer.h.1"),
        ({"n_layer": 10**9}, "n_layer=1000000000 with 29 tensors"),
    ],
)
def test_from_hf_refuses_what_it_cannot_compute(change, message):
    kwargs, state = to_hf(GPT(GPTConfig(**TINY)))
    with pytest.raises(GPTError, match=message):
        from_hf({**kwargs, **change}, state)


@torch.no_grad()
def test_attention_worked_by_hand():
    """With no queries or keys attention is the mean of the values so far; LayerNorm of (1, -1) is itself."""
    model = GPT(GPTConfig(vocab_size=2, block_size=4, n_layer=1, n_head=1, n_embd=2))
    attention = model.blocks[0].attn
    attention.qkv.weight.zero_()
    attention.qkv.weight[4:] = torch.eye(2)
    attention.proj.weight.copy_(torch.eye(2))
    model.blocks[0].mlp.down.weight.zero_()
    x = torch.tensor([[[1.0, -1.0], [1.0, -1.0], [-1.0, 1.0]]])
    expected = [[[2.0, -2.0], [2.0, -2.0], [-2 / 3, 2 / 3]]]  # x + means (1, -1), (1, -1), (1/3, -1/3)
    torch.testing.assert_close(model.blocks[0](x), torch.tensor(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_no_position_sees_a_later_one():
    model, ids = noisy(GPTConfig(**TINY)), random_ids(1, 12)
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 61
    difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert difference[:7].max() == 0
    assert difference[7:].min() > 0


@pytest.mark.parametrize("tied", [False, True])
def test_initial_weights_are_gpt2s(tied):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=500, block_size=64, n_layer=8, n_head=4, n_embd=128, tied=tied))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert p.count_nonzero() == 0, name
        elif "ln_" in name:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if name.endswith(("attn.proj.weight", "mlp.down.weight")) else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(p.mean().item()) < 5 * std / math.sqrt(p.numel()), name
    # An untrained model knows nothing: its loss is that of a uniform guess.
    assert model(random_ids(4, 64), random_ids(4, 64).flip(0)).item() == pytest.approx(math.log(500), abs=0.1)


def test_the_seed_decides_the_weights():
    def state(seed):
        torch.manual_seed(seed)
        return GPT(GPTConfig(**TINY)).state_dict()

    first, same, other = state(1), state(1), state(2)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_state_dict_names_are_stable_and_tied_weights_stored_once():
    names = set(GPT(GPTConfig(**{**TINY, "n_layer": 1})).state_dict())
    linear = {"attn.qkv", "attn.proj", "mlp.up", "mlp.down", "ln_1", "ln_2"}
    block = {f"blocks.0.{layer}.{part}" for layer in linear for part in ("weight", "bias")}
    assert names == block | {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias", "head.weight"}
    assert set(GPT(GPTConfig(**{**TINY, "n_layer": 1, "tied": True})).state_dict()) == names - {"head.weight"}


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_equal_cross_entropy_of_the_logits(tied):
    model, ids, targets = noisy(GPTConfig(**TINY, tied=tied)), random_ids(4, 16), random_ids(4, 16).flip(0)
    targets[0, :5] = -100
    parameters = list(model.parameters())
    plain = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    expected = torch.autograd.grad(plain, parameters)
    value = model(ids, targets)
    assert value.shape == ()
    torch.testing.assert_close(value, plain, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(value, parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int16, torch.uint8])
def test_ids_of_any_integer_width(dtype):
    model, ids = noisy(GPTConfig(**TINY)), random_ids(2, 8)
    assert torch.equal(model(ids.to(dtype)), model(ids))
    assert torch.equal(model(ids.to(dtype), ids.to(dtype)), model(ids, ids))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(dtype):
    model, ids = noisy(GPTConfig(**TINY)), random_ids(2, 8)
    with torch.autocast("cpu", dtype):
        value = model(ids, ids)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(model(ids, ids).item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_dropout_acts_in_training_only():
    model, ids = noisy(GPTConfig(**TINY, dropout=0.5)), random_ids(2, 8)
    assert torch.equal(model(ids), model(ids))
    sure = noisy(GPTConfig(**TINY))
    assert torch.equal(model(ids), sure(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    # Each of the three places acts by itself: embeddings, attention, residuals.
    attention_only = noisy(GPTConfig(**TINY, dropout=0.5)).eval()
    for block in attention_only.blocks:
        block.attn.training = True
    assert not torch.equal(attention_only(ids), attention_only(ids))
    model.eval().embedding_dropout.train()
    assert not torch.equal(model(ids), model(ids))
    model.eval().blocks[0].mlp.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="its CPU compiler gets embedding gradients wrong")
def test_compiles_without_a_graph_break_and_agrees():
    if not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    model, ids = noisy(GPTConfig(**{**TINY, "n_layer": 1})), random_ids(2, 16)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(ids, ids), parameters)
    value = torch.compile(model, fullgraph=True)(ids, ids)
    torch.testing.assert_close(value, model(ids, ids), rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(torch.autograd.grad(value, parameters), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "targets", "message"),
    [
        (random_ids(1, 17), None, "17 positions exceed block_size=16"),
        (random_ids(5), None, r"expected whole numbers of shape \(B, T\)"),
        (torch.ones(1, 5), None, "float32: expected whole numbers"),
        (random_ids(1, 5), random_ids(1, 4), r"targets \(1, 4\) do not fit ids \(1, 5\)"),
    ],
)
def test_misfitting_input_is_one_clear_line(ids, targets, message):
    with pytest.raises(GPTError, match=message):
        GPT(GPTConfig(**TINY))(ids, targets)
