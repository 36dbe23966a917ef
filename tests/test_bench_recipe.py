"""scripts/bench_recipe.py: its ingredients are what they are called, and what was measured is not measured again."""

import json

import pytest
import torch

from gpt.model import GPT, GPTConfig
from gpt.modern import GatedMLP, rotation
from scripts import bench_recipe
from scripts.bench_recipe import MODERN, PARTS, TRIED, build, name_of
from tests.helpers import error_of

SHAPE = {"vocab_size": 61, "block_size": 16}


def made(*ingredients):
    torch.manual_seed(0)
    return build("2x16", ingredients, **SHAPE)


def test_all_parts_together_are_the_modern_model_and_none_are_gpt2():
    for parts, arch in (((), "gpt2"), (MODERN, "modern")):
        torch.manual_seed(0)
        real = GPT(GPTConfig(n_layer=2, n_head=4, n_embd=16, arch=arch, **SHAPE)).state_dict()
        ours = made(*parts).state_dict()
        assert ours.keys() == real.keys()
        assert all(torch.equal(ours[k], real[k]) for k in real)


@pytest.mark.parametrize("part", [*PARTS, *TRIED])
def test_an_ingredient_alone_is_itself_and_nothing_else(part):
    """What a model has of each ingredient, seen in its own parts."""
    for parts in ((part,), tuple(p for p in (*PARTS, *TRIED) if p != part)):
        model = made(*parts)
        attention = model.blocks[1].attn
        with torch.no_grad():  # of a query made longer, QK-norm sees nothing; rotation is seen in the missing table
            x = torch.randn(1, 16, 16)
            angles = None if model.wpe else rotation(torch.arange(16), 4)
            before = attention(x, angles)
            linear = getattr(attention.qkv, "linear", attention.qkv)
            linear.weight[:16] *= 100
            if linear.bias is not None:
                linear.bias[:16] = 0
            normed = torch.allclose(attention(x, angles), before, atol=1e-5)
        has = {
            "rotary": model.wpe is None,
            "rms_norm": all(isinstance(m, torch.nn.RMSNorm) for m in (model.ln_f, model.blocks[1].ln_1)),
            "qk_norm": normed,
            "swiglu": isinstance(model.blocks[1].mlp, GatedMLP),
            "no_bias": model.blocks[1].attn.proj.bias is None,
            "zero_head": not model.head.weight.any(),
        }
        assert {name for name, there in has.items() if there} == set(parts)
        ids = torch.randint(61, (2, 16))
        assert model(ids, ids).isfinite()


def test_names():
    assert name_of(()) == "GPT-2"
    assert name_of(("muon",)) == "GPT-2 + muon"
    assert name_of(MODERN) == "modern"
    assert name_of(tuple(i for i in MODERN if i != "wsd")) == "modern - wsd"
    assert name_of((*MODERN, "zero_head")) == "modern + zero_head"


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_trials_are_kept_and_the_tables_told(data, tmp_path, capsys):
    output = tmp_path / "recipe.json"
    flags = ["--data", str(data), "--output", str(output), "--sizes", "1x16", "--tokens", "4K", "--block-size", "32",
             "--lrs", "3e-3", "--seeds", "2", "--eval-tokens", "512"]  # fmt: skip
    assert bench_recipe.main([*flags, "--minutes", "0.0001"]) == 0
    assert "more trials are left" in capsys.readouterr().out
    assert bench_recipe.main(flags) == 0
    said, page = capsys.readouterr().out, json.loads(output.read_text())
    assert len(page["trials"]) == 5 + 2 * len(MODERN) + 2 * len(TRIED)
    assert len(page["trials"][0]["curve"][0]) == 4
    assert "modern reached GPT-2's loss with 40% of its tokens at" in said
    assert bench_recipe.main(flags) == 0  # shows the tables again, and trains nothing
    again = [line for line in said.splitlines() if " seed " not in line]
    assert capsys.readouterr().out.splitlines() == again
    assert json.loads(output.read_text()) == page
    assert "holds results of other settings: give a new file" in error_of(bench_recipe.main, [*flags, "--batch", "8"])
