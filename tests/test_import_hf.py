"""A GPT2LMHeadModel folder becomes a run, bit for bit: sampled from, gone on with, and exported again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers, trainers

from gpt.hf import to_hf
from gpt.model import GPTConfig
from gpt.tokenizer import SPLIT_PATTERNS, blank_tokenizer
from scripts import export, sample
from scripts.loading import load_model
from tests.helpers import error_of, prepare, result, train
from tests.test_model import noisy

SHAPE = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 16, "tied": True}


@pytest.fixture(scope="module")
def given_tokenizer(corpus):
    """One without any of our special tokens, as GPT-2's but for <|endoftext|>."""
    tokenizer = blank_tokenizer(SPLIT_PATTERNS["gpt2"])
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train([str(corpus)], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=every_byte, show_progress=False))  # fmt: skip
    return tokenizer


@pytest.fixture
def folder(given_tokenizer, tmp_path):
    """What transformers' save_pretrained leaves."""
    path = tmp_path / "theirs"
    path.mkdir()
    kwargs, tensors = to_hf(noisy(GPTConfig(**SHAPE, vocab_size=given_tokenizer.get_vocab_size())))
    (path / "config.json").write_text(json.dumps({"model_type": "gpt2", **kwargs}))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    given_tokenizer.save(str(path / "tokenizer.json"))
    return path


def bring(folder, out):
    return export.main(["--from", "hf", str(folder), "--out", str(out)])


def test_what_we_exported_comes_back_bit_for_bit(run_folder, tmp_path):
    assert export.main(["--run", str(run_folder), "--output", str(tmp_path / "hf")]) == 0
    assert bring(tmp_path / "hf", tmp_path / "run") == 0
    ours, back = (load_model(str(run), device="cpu")[0].state_dict() for run in (run_folder, tmp_path / "run"))
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[name], back[name]) for name in ours)
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (run_folder / "tokenizer.json").read_bytes()


def test_transformers_own_folder_goes_there_and_back(given_tokenizer, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=given_tokenizer.get_vocab_size(), n_positions=32, n_embd=16, n_layer=2, n_head=2
    )
    theirs = transformers.GPT2LMHeadModel(config)
    theirs.save_pretrained(tmp_path / "theirs")
    given_tokenizer.save(str(tmp_path / "theirs" / "tokenizer.json"))
    assert bring(tmp_path / "theirs", tmp_path / "run") == 0
    assert "4 rows, the mean of the others, were added" in capsys.readouterr().out
    assert export.main(["--run", str(tmp_path / "run"), "--output", str(tmp_path / "again")]) == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    rows = config.vocab_size
    for name, tensor in load_file(tmp_path / "theirs" / "model.safetensors").items():
        assert torch.equal(again[name][:rows] if name == "transformer.wte.weight" else again[name], tensor), name
    card = (tmp_path / "again" / "README.md").read_text()
    assert "these weights were imported" in card
    added = again["transformer.wte.weight"][rows:]
    assert added.shape[0] == 4  # user, assistant, system, end
    assert torch.equal(added[0], again["transformer.wte.weight"][:rows].mean(0))


def test_it_can_be_sampled_and_gone_on_with(folder, corpus, tmp_path, capsys):
    run = tmp_path / "run"
    assert bring(folder, run) == 0
    assert sample.main(["--run", str(run), "--raw", "--prompt", "The", "--max-tokens", "3", "--device", "cpu"]) == 0
    assert prepare("--input", corpus, "--output", tmp_path / "d", "--tokenizer", run / "tokenizer.json") == 0
    flags = ("--data", tmp_path / "d", "--resume", "--device", "cpu", "--eval-tokens", 64, "--sample-every", 0)
    assert "--n-layer 3: the checkpoint was trained with 2" in error_of(train, *flags, "--out", run, "--n-layer", 3)
    shutil.copytree(run, tmp_path / "straight")
    recipe = (
        "--lr",
        2e-3,
        "--batch",
        4,
        "--optimizer",
        "adamw",
        "--dropout",
        0.1,
        "--save-every",
        2,
        "--schedule",
        "constant",
    )
    assert train(*flags, *recipe, "--out", tmp_path / "straight", "--steps", 6) == 0
    assert train(*flags, *recipe, "--out", run, "--steps", 3) == 0
    assert "--lr 0.5: the checkpoint was trained with 0.002" in error_of(train, *flags, "--out", run, "--lr", 0.5)
    assert train(*flags, "--out", run, "--steps", 6) == 0
    assert {**result(run), "metrics": 0} == {**result(tmp_path / "straight"), "metrics": 0}


def test_training_begins_with_the_imported_weights(folder, corpus, tmp_path):
    run = tmp_path / "run"
    assert bring(folder, run) == 0
    imported = load_model(str(run), device="cpu")[0].state_dict()
    assert prepare("--input", corpus, "--output", tmp_path / "d", "--tokenizer", run / "tokenizer.json") == 0
    flags = ("--data", tmp_path / "d", "--resume", "--device", "cpu", "--eval-tokens", 64, "--sample-every", 0)
    assert train(*flags, "--out", run, "--steps", 1, "--batch", 4, "--lr", 0.0) == 0
    trained = load_model(str(run), device="cpu", step=1)[0].state_dict()
    assert all(torch.equal(imported[name], trained[name]) for name in imported)


def test_a_run_in_a_bucket(folder, gcs):
    assert bring(folder, "gs://bucket/run") == 0
    model, _ = load_model("gs://bucket/run", device="cpu")
    ours = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(model.wte.weight[: len(ours)], ours)
    assert "is not empty" in error_of(bring, folder, "gs://bucket/run")


def test_data_of_another_tokenizer_is_refused(folder, corpus, data, tmp_path):
    run = tmp_path / "run"
    assert bring(folder, run) == 0
    flags = ("--out", run, "--resume", "--device", "cpu")
    assert "has a vocabulary of 512, the checkpoint one of 404" in error_of(train, "--data", data, *flags)
    other = json.loads((run / "tokenizer.json").read_text("utf-8"))
    vocab = other["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]  # as large, and made for other ids
    (tmp_path / "other.json").write_text(json.dumps(other), "utf-8")
    assert prepare("--input", corpus, "--output", tmp_path / "d", "--tokenizer", tmp_path / "other.json") == 0
    assert "with another tokenizer than the imported model's" in error_of(train, "--data", tmp_path / "d", *flags)


def test_rows_that_no_token_has_are_left_out(folder, tmp_path, capsys):
    """nanoGPT's 50,304 rows for GPT-2's 50,257 tokens."""
    kwargs, tensors = to_hf(noisy(GPTConfig(**SHAPE, vocab_size=448)))
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", **kwargs}))
    save_file(tensors, folder / "model.safetensors")
    assert bring(folder, tmp_path / "run") == 0
    assert "44 rows that no token has were left out" in capsys.readouterr().out
    model, tokenizer = load_model(str(tmp_path / "run"), device="cpu")
    assert torch.equal(model.wte.weight, tensors["transformer.wte.weight"][: tokenizer.vocab_size])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights are not read"),
        (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not what transformers writes"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "only gpt2 can be read"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 64), "model.safetensors cannot be read"),
        (lambda f: (f / "tokenizer.json").unlink(), "none of tokenizer.json"),
    ],
)  # fmt: skip
def test_what_is_no_such_folder_is_one_clear_line(break_it, message, folder, tmp_path):
    break_it(folder)
    assert message in error_of(bring, folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_flags_that_make_no_import(folder, tmp_path):
    for flags in (["--from", "hf", str(folder)], ["--from", str(folder), "--out", "x"], ["--out", "x"]):
        assert "an import is given as --from hf FOLDER --out RUN" in error_of(export.main, flags)
    both = ["--from", "hf", str(folder), "--out", str(tmp_path / "x"), "--to", "gguf"]
    assert "--to: has no effect on an import" in error_of(export.main, both)
    assert "is not empty" in error_of(bring, folder, folder)
