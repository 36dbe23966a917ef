"""What went wrong when a 134 M model was first trained on 12 GB in Colab, entry by entry of its diary: each is impossible
here, or ends in one line with nothing lost."""

import json
import re
import resource
import shutil
import subprocess
import sys
import threading
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import load_file

from cli import flags
from gpt.model import GPT
from gpt.presets import preset
from gpt.tokenizer import Tokenizer
from scripts import sample
from scripts.loading import load_model
from store.shards import TokenShards
from tests.helpers import ROOT, command, error_of, prepare, result, train
from tests.limited import limit
from tests.test_resume import SMALL, train_until_killed
from train import checkpoint, rehearsal, run, saver
from train.batches import Batches, WindowOrder
from train.config import TrainConfig


@pytest.fixture(scope="module")
def run_folder(data, tmp_path_factory):
    """Forty steps with a save every four."""
    out = tmp_path_factory.mktemp("diary") / "out"
    assert train("--data", data, "--steps", 40, "--save-every", 4, *SMALL, "--out", out) == 0
    return out


def conversations(n, first=0, answer="It is the number"):
    return "".join(
        f"User: what is number {i} of the list?\nAssistant: {answer} {i}.\n\n" for i in range(first, first + n)
    )


# ---- resuming -------------------------------------------------------------------------------------------------------


def test_resumed_with_another_block_size(run_folder, data):
    line = error_of(train, "--data", data, "--out", run_folder, "--block-size", 64, "--resume")
    assert "--block-size 64" in line
    assert "32" in line


def test_learning_rate_schedule_restarted_on_resume(data, run_folder, tmp_path, monkeypatch):
    flags = ("--data", data, "--steps", 40, "--save-every", 4, *SMALL, "--out", tmp_path / "out", "--resume")
    train_until_killed(monkeypatch, 23, *flags)
    assert train(*flags) == 0
    lrs = [[m["lr"] for m in result(out)["metrics"] if "lr" in m] for out in (tmp_path / "out", run_folder)]
    assert lrs[0] == lrs[1]


def test_the_loader_looks_for_a_file_name_that_the_saver_never_wrote(data, run_folder, tmp_path, capfd):
    """Both who read a checkpoint, a sampler and a resumed run, find every number that was trained."""
    newest = max(run_folder.glob("step-*"))
    named = json.loads((newest / "MANIFEST.json").read_text())["parts"]
    assert {f.name for f in newest.iterdir()} == {*named, "MANIFEST.json"}
    loaded = load_model(str(run_folder), device="cpu")[0].state_dict()
    saved = load_file(newest / "model.safetensors")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    shutil.copytree(run_folder, tmp_path / "out")
    assert train("--data", data, "--out", tmp_path / "out", "--resume", "--steps", 41) == 0
    assert "goes on from step 40" in capfd.readouterr().out
    assert checkpoint.committed(str(tmp_path / "out"))[-1].step == 41


def test_a_checkpoint_corrupted_by_an_interruption(data, run_folder, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(run_folder, out)
    newest, before = sorted(out.glob("step-*"))[:-3:-1]
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    assert train("--data", data, "--out", out, "--resume", "--steps", 41) == 0
    assert f"goes on from step {int(before.name.split('-')[1])}" in capfd.readouterr().out
    assert (out / "quarantine").is_dir()


def test_checkpoints_only_every_two_or_three_epochs(data, tmp_path, monkeypatch):
    """Ten to fifteen GPU hours went with each disconnect. Told nothing, at most five minutes go: here a step takes two."""
    now_s, rate = 0.0, run.rate

    def two_minutes_later(*args):
        nonlocal now_s
        now_s += 120
        return rate(*args)

    monkeypatch.setattr(saver, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(run, "rate", two_minutes_later)
    by_default = SMALL[: SMALL.index("--save-every-minutes")]
    train_until_killed(monkeypatch, 9, "--data", data, "--steps", 1000, *by_default, "--out", tmp_path / "out")
    assert [c.step for c in checkpoint.committed(str(tmp_path / "out"))] == [3, 6]


def test_checkpoints_as_often_as_asked_for(data, tmp_path, monkeypatch):
    often = ("--save-every", 0, "--save-every-minutes", 1e-6)
    train_until_killed(monkeypatch, 6, "--data", data, "--steps", 1000, *SMALL, *often, "--out", tmp_path / "out")
    assert checkpoint.committed(str(tmp_path / "out"))[-1].step == 5


# ---- the data path --------------------------------------------------------------------------------------------------


def test_random_reads_over_an_11_gb_memmap():
    """1.6 s a step on an A100. A batch reads from one shard, two where one ends."""
    order = WindowOrder([50_000_000] * 110, block_size=512, seed=1)  # 11 GB of uint16
    for step in range(0, 20_000, 500):
        shards, _ = order.locate(np.arange(step * 512, (step + 1) * 512))
        assert len(set(shards.tolist())) <= 2


def test_a_python_loop_in_the_batch_path():
    """However many sequences a batch has, Python is asked as often."""

    def calls(batch):
        batches = Batches([np.zeros(4_000_000, np.uint16)], block_size=64, batch=batch, seed=1)
        batches.batch_at(0)
        n = 0

        def count(frame, event, argument):
            nonlocal n
            n += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            batches.batch_at(1)
        finally:
            sys.setprofile(None)
        return n

    assert calls(4096) < 2 * calls(8)  # a permutation is walked a few rounds longer


def test_data_loading_on_the_main_thread():
    loaders = set()

    class Shards(list):
        def __getitem__(self, at):
            loaders.add(threading.current_thread())
            return super().__getitem__(at)

    batches = Batches(Shards([np.zeros(10_000, np.uint16)]), block_size=32, batch=4, seed=1)
    assert len(list(batches.ahead(0, 5))) == 5
    assert loaders
    assert threading.main_thread() not in loaders


def test_int32_targets_rejected_by_the_loss():
    model = GPT(preset("tiny", vocab_size=64, block_size=16, n_embd=32, n_head=2))
    ids = torch.randint(64, (2, 17))
    loss = model(ids[:, :-1], ids[:, 1:])
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(model(ids[:, :-1].to(dtype), ids[:, 1:].to(dtype)), loss)


def test_the_type_of_a_token_file_guessed(data, run_folder, tmp_path):
    """The file itself says it: what metadata.json claims changes nothing."""
    shutil.copytree(data, tmp_path / "data")
    metadata = json.loads((tmp_path / "data" / "metadata.json").read_text())
    assert metadata["dtype"] == "uint16"
    (tmp_path / "data" / "metadata.json").write_text(json.dumps(metadata | {"dtype": "uint32"}))
    out = tmp_path / "out"
    assert train("--data", tmp_path / "data", "--out", out, "--steps", 40, "--save-every", 4, *SMALL) == 0
    assert result(out)["metrics"] == result(run_folder)["metrics"]


def test_a_tokenizer_of_another_kind_than_the_data(data, corpus, run_folder, tmp_path):
    """A dataset and a checkpoint each hold their own; neither can be given the other's."""
    assert prepare("--input", corpus, "--output", tmp_path / "char", "--tokenizer-type", "char") == 0
    shutil.copytree(data, tmp_path / "mixed")
    shutil.copy(tmp_path / "char" / "tokenizer.json", tmp_path / "mixed" / "tokenizer.json")
    assert "tokenizer.json" in error_of(train, "--data", tmp_path / "mixed", "--out", tmp_path / "out", *SMALL)
    assert "vocabulary" in error_of(train, "--data", tmp_path / "char", "--out", run_folder, "--resume")
    assert (run_folder / "tokenizer.json").read_text() == (data / "tokenizer.json").read_text()


def test_validation_split_taken_from_the_end_of_the_file(tmp_path):
    """The last tenth is of another topic: a fair split has a tenth of it, not all of it."""
    corpus, out = tmp_path / "corpus.txt", tmp_path / "tokens"
    corpus.write_text(conversations(2700) + conversations(300, 2700, "ZEBRA"))
    assert prepare("--input", corpus, "--output", out, "--vocab-size", 400, "--val-fraction", 0.1) == 0
    tokens = TokenShards(str(out))
    ids = np.concatenate([tokens.load(s, preload=True) for s in tokens.split("val")])
    text = Tokenizer(tokens.tokenizer_json()).decode(ids.tolist())
    assert 5 <= text.count("ZEBRA") <= 80  # of some 300 documents


def test_garbage_from_three_percent_of_the_corpus_found_after_training(tmp_path):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "tokens"
    junk = "User: show me the page\nAssistant: " + "blockquote margin nbsp " * 150 + "\n\n"
    text = "".join(conversations(33, 33 * i) + junk.replace("page", f"page {i}") for i in range(100))
    corpus.write_text(text)
    assert prepare("--input", corpus, "--output", out, "--vocab-size", 600, "--clean", "off") == 0
    report = json.loads((out / "report.json").read_text())
    assert any(
        "blockquote" in s["token"] or "nbsp" in s["token"] or "margin" in s["token"]
        for s in report["vocabulary"]["suspicious"]
    )
    assert report["verdict"]["level"] != "good"


# ---- memory, disk, the machine --------------------------------------------------------------------------------------


def test_out_of_memory_after_raising_the_batch(data, tmp_path, monkeypatch):
    limit(monkeypatch, (1, 4))
    assert train("--data", data, "--out", tmp_path / "out", "--steps", 4, *SMALL, "--batch", 16) == 0
    assert [m["step"] for m in result(tmp_path / "out")["metrics"] if "lr" in m] == [1, 2, 3, 4]


def test_a_benchmark_that_did_not_resemble_the_run_and_a_fit_that_ran_out_of_memory(data, tmp_path, monkeypatch, capfd):
    """It had no loader and no optimizer state. The rehearsal is the trainer with the run's own settings: here memory ends
    in its third step, which one forward and backward pass, or a look at the sizes, would never have met."""
    rehearsed = []

    def with_little_memory(arguments, **options):
        rehearsed.append(flags.parse(TrainConfig, arguments[2:], prog="run.py", description="")[0])
        return subprocess.Popen(
            [sys.executable, "-m", "tests.limited", "[[3, -1]]", *arguments[2:]], cwd=ROOT, **options
        )

    monkeypatch.setattr(rehearsal, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": with_little_memory}))
    given = (
        "--data",
        data,
        "--out",
        tmp_path / "out",
        "--steps",
        1000,
        "--optimizer",
        "adamw",
        "--dropout",
        0.1,
        *SMALL,
    )
    assert train(*given, "--dry-run") == 0
    assert train(*given, "--preflight") == 2
    told = capfd.readouterr().out
    assert "run        3 steps of 8 x 32" in told
    no_go = (
        r"^no go      rehearsal: out of memory on cpu with micro-batch 1 .*give a smaller --model.* \(exit code 2\)$"
    )
    assert re.search(no_go, told, re.M)
    assert not re.search(r"^go  ", told.split("rehearsal  3 steps")[1], re.M)
    asked = flags.parse(TrainConfig, [*map(str, given)], prog="run.py", description="")[0]
    differ = {f.name for f in fields(TrainConfig) if getattr(asked, f.name) != getattr(rehearsed[0], f.name)}
    # how long, where, and what is shown and kept when: all else is the run's, and the learning rate's beginning with it
    assert differ - {"lr", "warmup"} <= {
        "out",
        "resume",
        "steps",
        "log_every",
        "eval_every",
        "sample_every",
        "log_to",
        "display",
    }
    assert (rehearsed[0].lr, rehearsed[0].warmup) == (3e-3, 20)
    assert list(tmp_path.iterdir()) == []


def test_gpu_memory_still_held_after_running_out_of_it(data, tmp_path, monkeypatch):
    """What the failed try had made is gone when the next one begins."""
    import gc
    import weakref

    limited, held = limit(monkeypatch, (1, 4)), []
    real = limited.forward

    def forward(model, ids, *args, **options):
        assert not [tensor for tensor in held if tensor() is not None]
        out = real(model, ids, *args, **options)
        if len(ids) > 4:
            gc.collect()
            held.append(weakref.ref(out))
        return out

    limited.forward = forward
    assert train("--data", data, "--out", tmp_path / "out", "--steps", 2, *SMALL) == 0
    assert held


def test_disk_full_because_nothing_was_rotated(run_folder):
    """Ten saves, two of them kept, and the best."""
    assert len(list(run_folder.glob("step-*"))) <= 3


@pytest.mark.parametrize("kind", ["hf", "gguf", "torch"])
def test_volume_quota_exceeded_while_exporting(run_folder, tmp_path, kind):
    def quota():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    arguments = command("scripts/export.py", "--run", run_folder, "--to", kind, "--output", tmp_path / "exported")
    done = subprocess.run(arguments, preexec_fn=quota, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not any(tmp_path.iterdir())


def test_a_bad_host(data, tmp_path):
    """Memory or a disk that flips a bit: no step is trained on what is not the data."""
    shutil.copytree(data, tmp_path / "data")
    shard = min((tmp_path / "data").glob("train-*"))
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    out = tmp_path / "out"
    line = error_of(
        train, "--data", tmp_path / "data", "--out", out, "--steps", 2000, "--cache", tmp_path / "cache", *SMALL
    )
    assert shard.name in line


def test_pip_version_conflicts():
    """Floors alone, with a lid where the next major version is known to break: nothing is ever downgraded."""
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower(), re.M))
    for requirement in map(Requirement, lines):
        assert {s.operator for s in requirement.specifier} <= {">=", "<"}
        assert requirement.specifier.contains(pinned[requirement.name].split("+")[0]), requirement


def test_a_sample_needs_the_run_alone(run_folder, tmp_path, monkeypatch, capsys):
    """Months later, with neither the dataset nor its tokenizer at hand."""
    shutil.copytree(run_folder, tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--run", "alone", "--prompt", "what is", "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out
