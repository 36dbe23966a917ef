"""Named sizes, what they cost, and configs that are refused."""

import dataclasses

import pytest
import torch

from gpt.errors import GPTError
from gpt.model import GPT, GPTConfig, count_params, flops_per_token, parameter_table
from gpt.presets import PRESETS, preset


def test_gpt2_small_at_32k_is_the_diarys_134_million():
    config = preset("gpt2_small", vocab_size=32000, block_size=512)
    assert count_params(config) == {"untied": 134_601_216, "tied": 110_025_216}


def test_gpt2_small_has_the_published_size():
    published = preset("gpt2_small", vocab_size=50257, block_size=1024, tied=True)
    assert sum(parameter_table(published).values()) == 124_439_808  # transformers' "gpt2"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_config(name):
    config = preset(name)
    assert config == GPTConfig(**PRESETS[name])
    assert 32 <= config.head_width <= 64


@pytest.mark.parametrize("shape", [{}, {"tied": True}, {"bias": False}, {"qkv_bias": False, "n_ff": 100}], ids=str)
def test_counts_without_memory_equal_those_of_a_real_model(shape):
    config = preset("tiny", vocab_size=100, block_size=32, **shape)
    model, table = GPT(config), parameter_table(config)
    assert sum(table.values()) == model.num_params() == sum(p.numel() for p in model.parameters())
    assert table["head"] == (0 if config.tied else 100 * 128)
    assert count_params(config)["tied" if config.tied else "untied"] == model.num_params()


def test_counting_draws_no_random_numbers():
    before = torch.get_rng_state()
    count_params(preset("tiny"))
    assert torch.equal(torch.get_rng_state(), before)


def test_flops_worked_by_hand():
    config = GPTConfig(vocab_size=10, block_size=8, n_layer=1, n_head=1, n_embd=4, bias=False)
    multiplied = 4 * 12 + 4 * 4 + 2 * 4 * 16 + 3 * 4 + 10 * 4  # qkv, proj, mlp, three norms, head
    assert flops_per_token(config) == 6 * multiplied + 12 * 1 * 4 * 8
    assert GPT(config).flops_per_token() == flops_per_token(config)
    assert flops_per_token(dataclasses.replace(config, tied=True)) == flops_per_token(config)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(GPTError, match="unknown preset 'gpt2-small', did you mean 'gpt2_small'"):
        preset("gpt2-small")
    with pytest.raises(GPTError, match="unknown model setting 'n_layers', did you mean 'n_layer'"):
        preset("tiny", n_layers=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0: expected a whole number"),
        ({"n_layer": 2.0}, "n_layer=2.0: expected a whole number"),
        ({"n_head": True}, "n_head=True"),
        ({"block_size": "512"}, "block_size='512'"),
        ({"n_ff": -1}, "n_ff=-1"),
        ({"n_embd": 770}, "n_embd=770 is no multiple of n_head=12: try n_embd=768 or 780"),
        ({"n_embd": 5}, "try n_embd=12"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"bias": 1}, "bias=1: expected True or False"),
        ({"tied": None}, "tied=None"),
    ],
)
def test_wrong_values_are_one_clear_line(fields, message):
    with pytest.raises(GPTError, match=message) as caught:
        GPTConfig(**fields)
    assert "\n" not in str(caught.value)
