"""Training learns what a textbook loop learns, and says in one line what a user got wrong."""

import itertools
import json
import os
import re
import shutil
import subprocess
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gpt.model import GPT, count_params
from gpt.presets import PRESETS, preset
from gpt.tokenizer import Tokenizer
from scripts import sample
from store.shards import TokenShards
from tests.helpers import command, error_of, files, prepare, result, train
from tests.test_checkpoint import rewrite
from train import batches as order
from train import checkpoint
from train.config import TrainConfig
from train.data import choose_preload, open_data
from train.schedule import learning_rate

SHAPE = ("--model", "tiny", "--n-embd", 64, "--block-size", 64, "--device", "cpu")
QUICK = (*SHAPE, "--batch", 4, "--steps", 2, "--eval-tokens", 512, "--sample-every", 0)


class Textbook(nn.Module):
    """GPT-2 from torch's own parts, as a tutorial would write it, with the weights of our model at its start."""

    def __init__(self, ours: GPT) -> None:
        super().__init__()
        c = ours.config
        self.n_head, self.wte, self.wpe = (
            c.n_head,
            nn.Embedding(c.vocab_size, c.n_embd),
            nn.Embedding(c.block_size, c.n_embd),
        )
        layers = [
            nn.TransformerEncoderLayer(
                c.n_embd, c.n_head, 4 * c.n_embd, dropout=0.0, batch_first=True, norm_first=True,
                activation=lambda x: F.gelu(x, approximate="tanh"),
            )
            for _ in range(c.n_layer)
        ]  # fmt: skip
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(c.n_embd)
        self.head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        names = {"ln_1": "norm1", "attn.qkv": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "ln_2": "norm2",
                 "mlp.up": "linear1", "mlp.down": "linear2", "ln_f": "norm", "blocks": "layers"}  # fmt: skip
        state = {}
        for name, value in ours.state_dict().items():
            for a, b in names.items():
                name = name.replace(a, b)
            state[name.replace("in_proj_.", "in_proj_")] = value.clone()
        self.load_state_dict(state)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        t = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(t)
        x = self.wte(ids) + self.wpe(torch.arange(t))
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x))


def test_500_steps_reach_the_loss_of_a_textbook_loop(data, tmp_path):
    """Same shape, first weights, data order and hyperparameters; the textbook's own arithmetic: within 1 %."""
    steps, batch, block, lr = 500, 8, 64, 2e-3
    flags = ("--data", data, *SHAPE, "--steps", steps, "--batch", batch, "--lr", lr, "--warmup", 20, "--eval-tokens", 8192,
             "--sample-every", 0, "--save-every-minutes", 0)  # fmt: skip
    assert train(*flags, "--out", tmp_path / "out") == 0
    ours = next(m["val_loss"] for m in reversed(result(tmp_path / "out")["metrics"]) if "val_loss" in m)

    tokens = TokenShards(str(data))
    arrays = {split: [tokens.load(s, preload=True) for s in tokens.split(split)] for split in ("train", "val")}
    torch.manual_seed(1)
    model = Textbook(GPT(preset("tiny", vocab_size=512, block_size=block, n_embd=64)))
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95), weight_decay=0.1
    )
    data_order = order.Batches(arrays["train"], block_size=block, batch=batch, seed=1)
    for step in range(steps):
        ids = torch.from_numpy(data_order.batch_at(step).astype(np.int64))
        loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(
                step, total=steps, peak=lr, warmup=20, schedule="cosine", floor=0.1, decay_fraction=0.2
            )
        optimizer.step()
    windows = order.validation_windows(arrays["val"], block_size=block, tokens=8192).astype(np.int64)
    with torch.no_grad():
        ids = torch.from_numpy(windows)
        theirs = F.cross_entropy(model.eval()(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()
    assert ours == pytest.approx(theirs, rel=0.01)
    assert ours < 0.5 * np.log(512)  # and both have learnt something


def test_chat_is_seen_in_the_tokens(data, tmp_path):
    assert is_chat(data)
    (tmp_path / "plain.txt").write_text("\n\n".join(f"It was day {i}, and User: is a word." for i in range(999)))
    assert prepare("--input", tmp_path / "plain.txt", "--output", tmp_path / "d", "--vocab-size", 300) == 0
    assert not is_chat(tmp_path / "d")


def is_chat(folder):
    config = TrainConfig(data=str(folder), block_size=32, batch=4)
    opened = open_data(config)
    batches = order.Batches(opened.train, block_size=32, batch=4, seed=1, lengths=opened.train.lengths)
    opened.begin(config, batches, 0, 1)
    assert opened.ready(lambda: False)
    opened.staging.close()
    return opened.chat


def logged(out, name):
    return [m[name] for m in result(out)["metrics"] if name in m]


def state_of(out):
    """state.json of the newest checkpoint."""
    return checkpoint.load(str(out), checkpoint.committed(str(out))[-1], ("state.json",)).state


def weights_of(out):
    return checkpoint.load(str(out), checkpoint.committed(str(out))[-1]).tensors["model.safetensors"]


def test_flags_of_the_shape_make_that_shape(data, tmp_path):
    for flags, shapes in (
        ((), {"blocks.0.attn.qkv.bias": (192,), "blocks.1.mlp.up.weight": (256, 64), "head.weight": (512, 64)}),
        (("--no-qkv-bias", "--n-layer", 1), {"blocks.0.attn.qkv.bias": None, "blocks.1.mlp.up.weight": None}),
        (("--n-ff", 96), {"blocks.1.mlp.up.weight": (96, 64), "blocks.1.mlp.down.weight": (64, 96)}),
    ):
        out = tmp_path / "-".join(["out", *map(str, flags)])
        assert train("--data", data, "--out", out, *QUICK, *flags) == 0
        found = weights_of(out)
        assert {name: tuple(found[name].shape) if name in found else None for name in shapes} == shapes, flags
        shape = {str(k)[2:].replace("-", "_"): v for k, v in itertools.pairwise(flags) if str(k).startswith("--n-")}
        qkv_bias = "--no-qkv-bias" not in flags
        expected = preset("tiny", vocab_size=512, block_size=64, n_embd=64, qkv_bias=qkv_bias, **shape)
        assert sum(t.numel() for t in found.values()) == count_params(expected)["untied"], flags


def test_flags_of_the_length_make_that_length(data, tmp_path):
    base = [f for f in QUICK if f not in ("--steps", 2)]
    windows = sum((s.tokens - 1) // 64 - 1 for s in TokenShards(str(data)).split("train"))
    for flags, steps in (
        (("--epochs", "0.01"), round(0.01 * windows / 4)),
        (("--tokens", "5k"), 5000 // (4 * 64)),
        (("--steps", 3), 3),
    ):
        assert train("--data", data, "--out", tmp_path / flags[0], *base, *flags) == 0
        assert result(tmp_path / flags[0])["step"] == steps > 1, flags
        assert len(logged(tmp_path / flags[0], "lr")) == steps


def test_a_linear_schedule_is_one(data, tmp_path):
    flags = ("--steps", 6, "--lr", 0.01, "--warmup", 1, "--schedule", "linear", "--lr-floor", 0.2)
    assert train("--data", data, "--out", tmp_path / "out", *QUICK, *flags) == 0
    # the warm-up's only step has the whole of it, then four fifths of it go in five steps
    assert logged(tmp_path / "out", "lr") == pytest.approx([0.01, 0.01, 0.0084, 0.0068, 0.0052, 0.0036])


def test_a_micro_batch_of_that_size_goes_through_the_model(data, tmp_path, monkeypatch, capsys):
    rows, forward = [], GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda model, ids, *a, **k: (rows.append(len(ids)), forward(model, ids, *a, **k))[1]
    )
    assert train("--data", data, "--out", tmp_path / "out", *QUICK, "--micro-batch", 3) == 0
    assert rows[:4] == [3, 1, 3, 1]  # two steps of a batch of four
    assert "; micro-batch 3;" in capsys.readouterr().out


def test_bf16_is_computed_in_and_fp32_kept(data, tmp_path, capsys):
    losses = {}
    for precision in ("fp32", "bf16"):
        assert train("--data", data, "--out", tmp_path / precision, *QUICK, "--precision", precision) == 0
        assert f"\nmachine    cpu, {precision}, torch " in capsys.readouterr().out
        losses[precision] = logged(tmp_path / precision, "loss")
        assert {t.dtype for t in weights_of(tmp_path / precision).values()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)


@pytest.mark.parametrize("loading", ["memmap", "preload"])
def test_tokens_are_where_loading_says(data, tmp_path, monkeypatch, loading):
    seen, loaded = set(), TokenShards.load

    def load(self, shard, *, preload=False, **options):
        array = loaded(self, shard, preload=preload, **options)
        seen.add(type(array))
        return array

    monkeypatch.setattr(TokenShards, "load", load)
    cache = tmp_path / "cache"
    flags = ("--loading", loading, "--cache", cache)
    assert train("--data", data, "--out", tmp_path / "out", *QUICK, *flags) == 0
    assert seen == {np.memmap if loading == "memmap" else np.ndarray}
    assert bool([f for f in cache.rglob("*.bin") if f.is_file()]) == (loading == "memmap")  # unpacked, to be mapped


def test_weight_decay_shrinks_matrices_and_nothing_else(data, tmp_path):
    """Each step takes lr x decay of a weight (Loshchilov & Hutter 2019, algorithm 2, with lr in the place of alpha x eta)."""
    lr, decay, steps = 1e-3, 0.5, 2
    flags = ("--lr", lr, "--warmup", 0, "--schedule", "constant")
    for wd in (0, decay):
        assert train("--data", data, "--out", tmp_path / str(wd), *QUICK, *flags, "--weight-decay", wd) == 0
    kept, shrunk = weights_of(tmp_path / "0"), weights_of(tmp_path / str(decay))
    torch.manual_seed(1)
    begin = GPT(preset("tiny", vocab_size=512, block_size=64, n_embd=64)).state_dict()
    for name, first in begin.items():
        if not first.any():  # biases begin at zero, where there is nothing to take from
            continue
        lost = float(((kept[name] - shrunk[name]) * first).sum() / (first * first).sum())
        assert lost == pytest.approx(steps * lr * decay if first.ndim > 1 else 0, rel=0.05, abs=2e-5), name


@pytest.mark.parametrize("name", PRESETS)
def test_a_step_of_every_preset(data, tmp_path, name):
    """Its width and heads, in one layer."""
    small = ("--n-layer", 1, "--block-size", 16, "--batch", 2, "--steps", 1, "--eval-tokens", 32, "--sample-every", 0)
    assert train("--data", data, "--out", tmp_path / "out", "--model", name, *small, "--device", "cpu") == 0
    assert logged(tmp_path / "out", "loss") == [pytest.approx(np.log(512), rel=0.1)]  # it knows nothing yet
    shape = state_of(tmp_path / "out")["model"]
    assert (shape["n_head"], shape["n_embd"]) == (PRESETS[name]["n_head"], PRESETS[name]["n_embd"])
    shutil.rmtree(tmp_path / "out")  # up to 160 MB


def test_characters_are_trained_on_and_sampled(corpus, tmp_path, capsys):
    flags = ("--tokenizer-type", "char", "--limit", "100kB", "--val-fraction", 0.05)
    assert prepare("--input", corpus, "--output", tmp_path / "tokens", *flags) == 0
    assert train("--data", tmp_path / "tokens", "--out", tmp_path / "out", *QUICK) == 0
    tokens = TokenShards(str(tmp_path / "tokens"))
    assert len(Tokenizer(tokens.tokenizer_json()).encode("a spider")) == 8
    assert weights_of(tmp_path / "out")["wte.weight"].shape == (tokens.vocab_size, 64)
    assert (tmp_path / "out" / "tokenizer.json").read_text("utf-8") == tokens.tokenizer_json()
    capsys.readouterr()
    shown = ("--raw", "--prompt", "a sp", "--max-tokens", "20", "--temperature", "1", "--device", "cpu")
    assert sample.main(["--run", str(tmp_path / "out"), *shown]) == 0
    said = capsys.readouterr().out
    assert said.startswith("a sp")
    assert 5 <= len(said) <= len("a sp") + 20 + 1  # a character each, at most, and the line's end


def test_half_the_stride_makes_an_epoch_of_twice_the_steps(data, tmp_path, capsys):
    flags = ("--data", data, *SHAPE, "--batch", 8, "--eval-tokens", 512, "--epochs", 0.02)
    steps = []
    for name, more in (("plain", ()), ("strided", ("--stride", 32))):
        assert train(*flags, "--out", tmp_path / name, *more) == 0
        told = re.search(r"^run        (\d+) steps of 8 x 64 .*, (\d\.\d+) epochs", capsys.readouterr().out, re.M)
        assert float(told[2]) == pytest.approx(0.02, abs=0.006)
        steps.append(int(told[1]))
    assert steps[1] == pytest.approx(2 * steps[0], abs=1)


def test_raw_and_compressed_shards_give_the_same_training(corpus, data, tmp_path):
    flags = ("--vocab-size", 512, "--shard-tokens", 40_000, "--val-fraction", 0.05)
    assert prepare("--input", corpus, "--output", tmp_path / "raw", *flags) == 0
    for name, folder in (("a", data), ("b", tmp_path / "raw")):
        assert train("--data", folder, "--out", tmp_path / name, *QUICK) == 0
    assert result(tmp_path / "a") == result(tmp_path / "b")


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="refused there: train/precision.py says why")
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="inductor needs a C++ compiler on a CPU"
)
def test_compiled_is_the_same_model(data, tmp_path):
    """The same losses, through inductor; its checkpoints have plain names and go on without compilation."""
    small = ("--n-layer", 1, "--n-embd", 32, "--n-head", 2, "--block-size", 32, "--eval-tokens", 128)
    flags = ("--data", data, *QUICK, *small, "--resume", "--lr", 0.01, "--warmup", 0)
    for name, compiled in (("eager", "off"), ("compiled", "on")):
        assert train(*flags, "--out", tmp_path / name, "--compile", compiled, "--compile-cache", "off") == 0
    eager, ours = (logged(tmp_path / name, "loss") for name in ("eager", "compiled"))
    assert ours == pytest.approx(eager, rel=1e-5)
    assert "wte.weight" in weights_of(tmp_path / "compiled")
    assert train(*flags, "--out", tmp_path / "compiled", "--compile", "off", "--steps", 4) == 0
    assert train(*flags, "--out", tmp_path / "eager", "--compile", "off", "--steps", 4) == 0
    eager, ours = (logged(tmp_path / name, "loss") for name in ("eager", "compiled"))
    assert ours == pytest.approx(eager, rel=1e-4)


def test_what_a_person_sees_and_finds(data, tmp_path, capsys):
    flags = (
        *QUICK,
        "--steps",
        4,
        "--log-every",
        2,
        "--eval-every",
        2,
        "--sample-every",
        4,
        "--save-every",
        2,
        "--keep",
        1,
    )
    assert train("--data", data, "--out", tmp_path / "out", *flags) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"^model      tiny: 2 layers, 4 heads, 64 wide, 0\.2 M parameters \(untied; tied 0\.1 M\)$", text, re.M
    )
    line = r"^step 4/4 \| loss \d\.\d{4} \| val \d\.\d{4} \| lr \d\.\d\de-\d\d \| norm \d+\.\d\d \| \S+ tok/s \| epoch 0\.\d\d \| 0:\d\d \| eta 0:00$"
    assert re.search(line, text, re.M)
    assert text.count("\nsample     ") == 2
    assert "finished   4 steps" in text
    assert "peak memory" in text
    names = set(files(tmp_path / "out"))
    assert {"config.json", "metrics.jsonl", "events.jsonl", "tokenizer.json", "samples/step-00000004.txt"} <= names
    metrics = result(tmp_path / "out")["metrics"]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2, 3, 4]
    events = [json.loads(e)["event"] for e in (tmp_path / "out" / "events.jsonl").read_text().splitlines()]
    happened = ["start", "first_step", "saved", "saved", "finished"]
    assert [e for e in events if e in happened] == happened
    assert {"evaluated", "sampled", "save_begun"} < set(events)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (data / "tokenizer.json").read_bytes()


def altered(data, folder, change):
    """A copy of a dataset with one thing wrong."""
    folder.mkdir()
    for name, raw in files(data).items():
        (folder / name).write_bytes(raw)
    change(folder)
    return folder


def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


def newer(path):
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 2}))


def bad_runs(data, corpus, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.doc").write_bytes(b"do not touch")
    (tmp_path / "file").write_bytes(b"x")
    run = tmp_path / "run"
    assert train("--data", data, "--out", run, *QUICK) == 0
    newer_run = tmp_path / "newer-run"
    newer_run.mkdir()
    (newer_run / "config.json").write_text('{"format": "perennial-run", "version": 9, "run_id": "x"}')
    newer_checkpoint = tmp_path / "newer-checkpoint"
    assert train("--data", data, "--out", newer_checkpoint, *QUICK) == 0
    rewrite(newer_checkpoint / "step-00000002-0001" / "MANIFEST.json", version=2)
    other = tmp_path / "other-vocabulary"
    assert prepare("--input", corpus, "--output", other, "--vocab-size", 300, "--val-fraction", 0.05) == 0
    reseeded = tmp_path / "reseeded"
    assert prepare("--input", corpus, "--output", reseeded, "--tokenizer", data / "tokenizer.json", "--seed", 3) == 0
    shard = "train-00001.bin.zst"
    return {
        "no dataset": (("--data", tmp_path / "no"), "no token dataset there"),
        "unfinished dataset": (("--data", altered(data, tmp_path / "d0", lambda f: (f / "metadata.json").unlink())), "no token dataset"),
        "missing shard": (("--data", altered(data, tmp_path / "d1", lambda f: (f / shard).unlink())), f"{shard} is missing"),
        "cut shard": (("--data", altered(data, tmp_path / "d2", lambda f: (f / shard).write_bytes(b"x"))), f"{shard} has 1 bytes"),
        "altered shards": (("--data", altered(data, tmp_path / "d3", lambda f: [flip(p) for p in f.glob("*.zst")])), ".bin.zst: damaged"),
        "newer dataset": (("--data", altered(data, tmp_path / "d4", lambda f: newer(f / "metadata.json"))), "newer than this"),
        "swapped tokenizer": (("--data", altered(data, tmp_path / "d5", lambda f: (f / "tokenizer.json").write_text("{}"))),
                              "not the tokenizer these shards were made with"),
        "too few tokens": (("--block-size", 65_000), "too few for one batch of 4"),
        "unknown preset": (("--model", "smal"), "unknown preset 'smal', did you mean 'small'?"),
        "impossible shape": (("--n-embd", 30, "--n-head", 4), "n_embd=30 is no multiple of n_head=4"),
        "two run lengths": (("--epochs", 1), "give only one of"),
        "negative": (("--lr", -1), "--lr -1.0: expected 0 or more"),
        "no such device": (("--device", "tpu"), "expected auto, cuda, cuda:1, mps or cpu"),
        "no GPU here": (("--device", "cuda"), "torch sees no GPU here") if not torch.cuda.is_available() else (("--lr", -1), "--lr"),
        "fp16 on a CPU": (("--precision", "fp16"), "a CPU has no fast fp16"),
        "out is a file": (("--out", tmp_path / "file"), "is a file"),
        "out under a file": (("--out", tmp_path / "file" / "out"), "is a file"),
        "out holds something else": (("--out", tmp_path / "thesis"), "is not empty (thesis.doc"),
        "the same with --resume": (("--out", tmp_path / "thesis", "--resume"), "holds something that is not a run (thesis.doc"),
        "a run, without --resume": (("--out", run), "add --resume"),
        "block size of another run": (("--out", run, "--resume", "--block-size", 32), "--block-size 32: the checkpoint was trained with 64"),
        "stride of another run": (("--out", run, "--resume", "--stride", 32), "--stride 32: the checkpoint was trained with the default: leave"),
        "stride beyond the block": (("--stride", 65), "--stride 65: expected 1 to the block size, 64"),
        "batch of another run": (("--out", run, "--resume", "--batch", 8), "--batch 8: the checkpoint was trained with 4"),
        "data of another vocabulary": (("--out", run, "--resume", "--data", other), "vocabulary of 300, the checkpoint one of 512"),
        "other data, same vocabulary": (("--out", run, "--resume", "--data", reseeded), "is not the dataset this run was trained on"),
        "newer checkpoint": (("--out", newer_checkpoint, "--resume"), "checkpoint format 2 is newer than this program's 1"),
        "newer run": (("--out", newer_run, "--resume"), "run format 9 is newer"),
        "unknown storage": (("--out", "ftpx://host/out"), "unknown kind of URL"),
        **({} if find_spec("s3fs") else {"missing driver": (("--out", "s3://bucket/out"), "pip install s3fs")}),
    }  # fmt: skip


def test_each_user_error_is_one_line_and_writes_nothing(data, corpus, tmp_path):
    cases = bad_runs(data, corpus, tmp_path)
    before = files(tmp_path)
    for name, (flags, says) in cases.items():
        given = {flag: True for flag in flags if str(flag).startswith("--")}
        base = [
            *([] if "--data" in given else ["--data", data]),
            *([] if "--out" in given else ["--out", tmp_path / "out"]),
        ]
        message = error_of(train, *base, *QUICK, *flags)
        assert says in message, (name, message)
        assert files(tmp_path) == before, name
        assert not (tmp_path / "out").exists(), name


def test_as_a_real_process_an_error_is_one_line_and_exit_2(tmp_path):
    for flags, says in (
        ((), "no token dataset there"),
        (("--bach", "3"), "did you mean --batch?"),
        (("--steps", "x"), "--steps"),
    ):
        done = subprocess.run(command("train/run.py", *flags), cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert done.stderr.startswith("error: ")
        assert says in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_storage_that_is_away_at_the_start_is_for_trying_again(tmp_path):
    """Nobody answers at the address of the data: one line, and the exit code on which a loop goes on."""
    environment = {**os.environ, "PERENNIAL_RETRY_FOR_S": "0.1"}
    away = command("train/run.py", "--data", "http://127.0.0.1:9/tokens", "--out", tmp_path / "out")
    done = subprocess.run(away, env=environment, capture_output=True, text=True)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.returncode, len(told)) == (74, 1), done.stderr
    assert told[0].startswith("error: http://127.0.0.1:9/tokens/metadata.json: cannot ")
    assert not (tmp_path / "out").exists()


def test_environment_and_drive_fill_in_the_places(data, tmp_path, monkeypatch):
    """What makes the bare `!python train/run.py --resume` right in a Colab cell."""
    from store import drive
    from train import config

    monkeypatch.setenv("PERENNIAL_DATA", str(data))
    monkeypatch.setenv("PERENNIAL_OUT", str(tmp_path / "out"))
    assert train("--resume", *QUICK) == 0
    assert (tmp_path / "out" / "config.json").exists()
    monkeypatch.setenv("COLAB_RELEASE_TAG", "x")
    monkeypatch.setattr(drive, "MOUNT", tmp_path)
    (tmp_path / "MyDrive").mkdir()
    places = config.with_places(config.TrainConfig())
    assert not config.dies_with_the_machine(places.out)
    assert not config.dies_with_the_machine("gs://bucket/out")
    assert config.dies_with_the_machine("out")
    assert (places.data, places.out) == tuple(str(tmp_path / "MyDrive" / "perennial" / n) for n in ("data", "out"))


def test_a_model_of_the_right_size_is_chosen():
    from train.config import TrainConfig, total_steps, with_recipe

    assert with_recipe(TrainConfig(), "cuda").model == "gpt2_small"
    cpu = with_recipe(TrainConfig(), "cpu")
    assert cpu.model == "small"
    assert total_steps(cpu, 3200) == 3200 // cpu.batch  # one epoch unless told otherwise
    assert total_steps(with_recipe(TrainConfig(epochs=2.5), "cpu"), 3200) == 250
    assert total_steps(with_recipe(TrainConfig(tokens=512 * 32 * 7), "cpu"), 3200) == 7


def test_choose_preload():
    """As told; on auto, small data is held in memory and what cannot fit is not."""
    assert choose_preload("preload", 1 << 60)
    assert not choose_preload("memmap", 0)
    assert choose_preload("auto", 1 << 20)
    assert not choose_preload("auto", 1 << 60)
