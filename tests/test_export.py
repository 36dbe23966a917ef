"""What is exported gives the same logits, ids and text where it is read, without a network."""

import json
import os
import re
import shutil

import pytest
import torch

from gpt.model import GPT
from gpt.presets import PRESETS, preset
from gpt.sample import generate
from gpt.tokenizer import Tokenizer
from scripts import export
from scripts.loading import load_model
from tests.helpers import error_of


@pytest.fixture(scope="module")
def exported(run_folder, data):
    folder = run_folder.parent / "hf"
    flags = ["--run", str(run_folder), "--output", str(folder), "--data", str(data), "--price-per-hour", "3600"]
    assert export.main(flags) == 0
    return folder


def test_transformers_loads_the_folder_and_agrees(run_folder, exported, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ours, our_tokenizer = load_model(str(run_folder), device="cpu")

    ids = torch.randint(5, ours.config.vocab_size, (2, 31), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (theirs(ids).logits - ours(ids)).abs().max() < 1e-4
    chat = [("user", "Hello there!"), ("assistant", "Hi."), ("user", "Ça va?  Good ☃")]
    messages = [{"role": role, "content": text} for role, text in chat]
    rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(rendered) == our_tokenizer.render(chat, reply=True)
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])

    stops = theirs.generation_config.eos_token_id
    assert stops == [our_tokenizer.end_of_turn, our_tokenizer.end_of_text]
    with torch.no_grad():
        prompt = torch.tensor([rendered[:12]])
        out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12)
    said = generate(ours, [rendered[:12]], max_tokens=12, temperature=0.0, stop_ids=tuple(stops))[0]
    assert [t for t in out[0].tolist()[12:] if t not in stops] == said


def test_the_model_card_tells_of_the_run(exported, run_folder, data):
    card = (exported / "README.md").read_text()
    assert "12 steps of 8 x 32" in card
    assert "| validation loss |" in card
    assert "What is the capital of France?" in card
    assert "· training loss" in card  # the curve
    metadata = json.loads((data / "metadata.json").read_text())
    assert f"| corpus.txt | {metadata['counts']['bytes']:,} |" in card
    assert f"{metadata['totals']['train']['tokens']:,} tokens to train on" in card
    assert "Cleaning: `standard`" in card
    paid = re.search(r"([0-9.]+) at 3600 an hour", card)  # so many seconds
    assert 0 < float(paid[1]) < 600
    assert "# license: name one" in card
    assert str(exported.parent) not in card  # nothing of this machine


def test_the_card_of_an_earlier_step_knows_nothing_later(run_folder, tmp_path):
    assert export.main(["--run", str(run_folder), "--output", str(tmp_path / "six"), "--step", "6"]) == 0
    card = (tmp_path / "six" / "README.md").read_text()
    assert (run_folder / "samples" / "step-00000006.txt").read_text().strip() in card
    assert (run_folder / "samples" / "step-00000012.txt").read_text().strip() not in card
    assert "mean of the last 6 steps" in card
    assert "Say what it was trained on" in card


def test_a_dataset_that_is_not_the_runs_is_refused(run_folder, data, tmp_path):
    shutil.copytree(data, tmp_path / "other")
    metadata = json.loads((data / "metadata.json").read_text())
    metadata["shards"][0]["xxh3"] = "0" * 16
    (tmp_path / "other" / "metadata.json").write_text(json.dumps(metadata))
    flags = ["--run", str(run_folder), "--output", str(tmp_path / "x"), "--data"]
    assert "is not the dataset this run was trained on" in error_of(export.main, [*flags, str(tmp_path / "other")])
    assert "no token dataset there" in error_of(export.main, [*flags, str(tmp_path / "none")])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("arch", ["gpt2", "modern"])
@pytest.mark.parametrize("name", PRESETS)
@torch.no_grad()
def test_every_presets_logits_equal_transformers(name, arch, data, tmp_path):
    """Through the folder, of its widths and heads; with PERENNIAL_FULL_PRESETS=1 of all layers, 32k ids and 512 positions."""
    transformers = pytest.importorskip("transformers")
    if arch == "modern" and not hasattr(transformers, "Qwen3ForCausalLM"):
        pytest.skip("transformers below 4.51 has no Qwen3")
    full = os.environ.get("PERENNIAL_FULL_PRESETS") == "1"
    tokenizer = Tokenizer((data / "tokenizer.json").read_text())
    small = {} if full else {"n_layer": 1, "block_size": 64}
    vocab_size = 32_000 if full else tokenizer.vocab_size
    torch.manual_seed(1)
    model = GPT(preset(name, arch=arch, vocab_size=vocab_size, **small)).eval()
    for p in model.parameters():  # zero biases, gains of one and a head of zeros would hide what is mixed up
        p.add_(torch.randn_like(p) * 0.02)
    export.write_hf(tmp_path, model, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(vocab_size, (1, model.config.block_size), generator=torch.Generator().manual_seed(1))
    logits = model(ids)
    difference = (theirs(ids).logits - logits).abs().max()
    assert logits.std() > 0.2
    assert difference < 1e-4
    if full:
        print(f"{name} {arch}: {model.num_params() / 1e6:.1f} M parameters, {difference:.1e}")


def test_torch_export_is_the_model_itself(run_folder, tmp_path):
    from safetensors.torch import load_file

    from gpt.model import GPT, GPTConfig

    assert export.main(["--run", str(run_folder), "--to", "torch", "--output", str(tmp_path / "t"), "--step", "6"]) == 0
    model = GPT(GPTConfig(**json.loads((tmp_path / "t" / "model.json").read_text())))
    model.load_state_dict(load_file(tmp_path / "t" / "model.safetensors"))
    ours, _ = load_model(str(run_folder), device="cpu", step=6)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), ours.state_dict().values(), strict=True))


def test_a_folder_that_holds_something_is_refused_and_kept(run_folder, tmp_path):
    (tmp_path / "mine").write_text("precious")
    assert "is not empty" in error_of(export.main, ["--run", str(run_folder), "--output", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    assert "no checkpoint of step 7" in error_of(
        export.main, ["--run", str(run_folder), "--output", str(tmp_path / "x"), "--step", "7"]
    )
    assert not (tmp_path / "x").exists()


def test_a_model_loads_in_the_format_it_is_asked_for_and_answers(run_folder):
    model, _ = load_model(str(run_folder), device="cpu", precision="bf16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert len(generate(model, [[0, 5]], max_tokens=3, temperature=0)[0]) == 3
