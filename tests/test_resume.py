"""Laws 1 and 2: killed anywhere, training goes on from the last commit, and ends as if nothing had happened."""

import hashlib
import itertools
import json
import os
import random
import signal
import time

import pytest
import torch

from tests.helpers import command, error_of, files, prepare, result, saves_in_time, start, train
from train import checkpoint, run
from train.saver import Saver

SMALL = ("--model", "tiny", "--n-embd", 32, "--n-head", 2, "--block-size", 32, "--batch", 8, "--device", "cpu",
         "--log-every", 4, "--eval-every", 8, "--eval-tokens", 512, "--sample-every", 0, "--save-every-minutes", 0)  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL inside this process: nothing catches it, nothing is saved."""


def train_until_killed(monkeypatch, step, *flags):
    """Train, and die in the middle of that step (after its forward and backward pass, before it counts).

    A save that was in flight is let end: its thread lives on in this process, as it would not after a real SIGKILL.
    """
    real, calls, savers = run.train_step, 0, []

    def dying(*args, **kwargs):
        nonlocal calls
        out = real(*args, **kwargs)
        calls += 1
        if calls == step:
            raise Killed
        return out

    with monkeypatch.context() as m:
        m.setattr(run, "train_step", dying)
        saves_in_time(m)
        m.setattr(run, "Saver", lambda *args, **kwargs: savers.append(Saver(*args, **kwargs)) or savers[-1])
        with pytest.raises(Killed):
            train(*flags)
        savers[0].finish(60)


def windows_per_epoch(data):
    tokens = json.loads((data / "metadata.json").read_text())["shards"]
    return sum((s["tokens"] - 1) // 32 - 1 for s in tokens if s["split"] == "train")


CASES = {
    "mid-epoch": (),
    "dropout": ("--dropout", 0.2),
    "accumulation": ("--micro-batch", 3),  # 8 = 3 + 3 + 2
    "warm-up edge": ("--warmup", 14),  # its last step is a commit; another kill falls right behind it
    "wsd, no clipping": ("--schedule", "wsd", "--clip", 0),
    "bf16": ("--precision", "bf16"),
    "tied, no biases": ("--tied", "--no-bias"),
    "memmap": ("--loading", "memmap"),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_uninterrupted_bit_for_bit(data, tmp_path, monkeypatch, case):
    flags = ("--data", data, "--steps", 30, "--save-every", 7, "--resume", *SMALL, *CASES[case])
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    for step in (18, 3, 9):  # dies at 18, after the commit at 14; at 17; at 23; then comes to its end
        train_until_killed(monkeypatch, step, *flags, "--out", tmp_path / "killed")
    assert train(*flags, "--out", tmp_path / "killed") == 0
    assert result(tmp_path / "killed") == result(tmp_path / "quiet")


def test_over_the_end_of_an_epoch_and_with_another_save_interval(corpus, tmp_path, monkeypatch):
    data = tmp_path / "tokens"
    assert prepare("--input", corpus, "--output", data, "--vocab-size", 300, "--limit", 60_000) == 0
    last = windows_per_epoch(data) // 64
    steps = 2 * last + 4
    flags = ("--data", data, *SMALL, "--batch", 64, "--eval-every", 0, "--resume", "--steps", steps)
    assert train(*flags, "--save-every", 1000, "--out", tmp_path / "quiet") == 0
    killed = ("--out", tmp_path / "killed")
    train_until_killed(monkeypatch, last + 1, *flags, "--save-every", last - 1, *killed)  # just over the first end
    assert checkpoint.committed(str(tmp_path / "killed"))[-1].step == last - 1
    train_until_killed(monkeypatch, last + 3, *flags, "--save-every", 2, *killed)  # just over the second
    assert train(*flags, "--save-every", 3, *killed) == 0
    assert result(tmp_path / "killed") == result(tmp_path / "quiet")


def test_another_micro_batch_keeps_data_and_result(data, tmp_path, monkeypatch):
    """Sums in another order round differently: equal to six digits, not bit for bit; the data order is the same."""
    flags = ("--data", data, "--steps", 20, "--save-every", 5, "--resume", *SMALL)
    assert train(*flags, "--micro-batch", 8, "--out", tmp_path / "quiet") == 0
    train_until_killed(monkeypatch, 12, *flags, "--micro-batch", 8, "--out", tmp_path / "killed")
    assert train(*flags, "--micro-batch", 2, "--out", tmp_path / "killed") == 0
    a, b = result(tmp_path / "quiet")["metrics"], result(tmp_path / "killed")["metrics"]
    assert [m["step"] for m in a] == [m["step"] for m in b]
    for x, y in zip(a, b, strict=True):
        assert x.get("loss", 0) == pytest.approx(y.get("loss", 0), rel=1e-5)


def test_a_longer_run_goes_on_from_a_finished_one(data, tmp_path):
    flags = ("--data", data, "--schedule", "constant", "--resume", *SMALL)
    assert train(*flags, "--steps", 6, "--warmup", 2, "--out", tmp_path / "out") == 0
    assert train(*flags, "--steps", 6, "--out", tmp_path / "out") == 0  # finished already: nothing happens
    assert train(*flags, "--steps", 12, "--out", tmp_path / "out") == 0
    assert train(*flags, "--steps", 12, "--warmup", 2, "--out", tmp_path / "straight") == 0
    steps = {name: [m for m in result(tmp_path / name)["metrics"] if "loss" in m] for name in ("out", "straight")}
    assert steps["out"] == steps["straight"]


def wait_for_step(out, step, process, limit_s=120):
    begin_s = time.monotonic()
    while time.monotonic() - begin_s < limit_s:
        if process.poll() is not None:
            return False
        path = out / "metrics.jsonl"
        if path.exists() and path.read_text().count('"loss"') >= step:
            return True
        time.sleep(0.02)
    raise AssertionError("no progress")


def test_sigkill_at_random_moments_of_real_processes(data, tmp_path):
    """Law 1 with real processes and real kills, most of them with a save under way somewhere near."""
    flags = ("--data", data, "--steps", 400, "--save-every", 3, "--resume", *SMALL, "--log-every", 1)
    quiet = start("train/run.py", *flags, "--out", tmp_path / "quiet")
    rng, last = random.Random(7), 0
    for kill in range(4):
        process = start("train/run.py", *flags, "--out", tmp_path / "killed")
        assert wait_for_step(tmp_path / "killed", 80 * kill + 20 + rng.randrange(40), process)
        time.sleep(rng.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        committed = [m.step for m in checkpoint.committed(str(tmp_path / "killed"))]
        assert committed
        assert committed[-1] >= last  # nothing committed is ever lost
        last = committed[-1]
    process = start("train/run.py", *flags, "--out", tmp_path / "killed")
    assert process.wait(120) == 0
    assert quiet.wait(120) == 0
    assert result(tmp_path / "killed") == result(tmp_path / "quiet")
    steps = [m["step"] for m in result(tmp_path / "killed")["metrics"] if "loss" in m]
    assert steps == list(range(1, 401))  # every step logged once


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_the_very_step_and_exits_75(data, tmp_path, number):
    flags = ("--data", data, "--steps", 100_000, "--resume", *SMALL, "--log-every", 1)
    process = start("train/run.py", *flags, "--out", tmp_path / "out")
    assert wait_for_step(tmp_path / "out", 10, process)
    process.send_signal(number)
    assert process.wait(60) == 75
    newest = checkpoint.committed(str(tmp_path / "out"))[-1].step
    logged = [json.loads(x)["step"] for x in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert newest == max(logged) >= 10


def test_resume_is_right_the_first_time_and_without_it_a_run_is_refused(data, tmp_path):
    flags = ("--data", data, "--steps", 2, *SMALL, "--out", tmp_path / "out")
    assert train(*flags, "--resume") == 0
    before = files(tmp_path / "out")
    assert "add --resume to go on" in error_of(train, *flags)
    assert files(tmp_path / "out") == before


def test_a_run_killed_before_its_first_save_starts_again(data, tmp_path, monkeypatch):
    flags = ("--data", data, "--steps", 6, *SMALL, "--resume", "--out", tmp_path / "out")
    train_until_killed(monkeypatch, 3, *flags)
    assert train(*flags) == 0
    steps = [m["step"] for m in result(tmp_path / "out")["metrics"] if "loss" in m]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_damaged_newest_checkpoint_costs_one_interval_not_the_result(data, tmp_path, monkeypatch, capsys):
    flags = ("--data", data, "--steps", 20, "--save-every", 5, *SMALL, "--resume")
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    train_until_killed(monkeypatch, 17, *flags, "--out", tmp_path / "hurt")
    newest = checkpoint.committed(str(tmp_path / "hurt"))[-1].name  # step 15, later where the disk is slow
    part = tmp_path / "hurt" / newest / "optimizer.safetensors"
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    assert train(*flags, "--out", tmp_path / "hurt") == 0
    assert f"{newest} is damaged (optimizer.safetensors has another sha256" in capsys.readouterr().err
    assert result(tmp_path / "hurt") == result(tmp_path / "quiet")


def test_a_remote_run_folder_resumes_on_another_machine(data, tmp_path, monkeypatch):
    """Nothing but the URL is needed: the cache of the first machine is gone."""
    flags = ("--data", data, "--steps", 20, "--save-every", 5, *SMALL, "--resume")
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    url = f"memory://bucket/{tmp_path.name}"
    train_until_killed(monkeypatch, 13, *flags, "--out", url, "--cache", tmp_path / "machine-1")
    assert train(*flags, "--out", url, "--cache", tmp_path / "machine-2") == 0
    from store import fs

    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "metrics.jsonl").write_bytes(fs.read_bytes(f"{url}/metrics.jsonl"))
    newest = checkpoint.committed(url)[-1]
    quiet = result(tmp_path / "quiet")
    assert {p: newest.parts[p]["sha256"] for p in checkpoint.TENSOR_PARTS} == {
        p: quiet[p] for p in checkpoint.TENSOR_PARTS
    }
    lines = [json.loads(line) for line in (tmp_path / "copy" / "metrics.jsonl").read_text().splitlines()]
    assert lines == quiet["metrics"]


def test_storage_that_fails_does_not_stop_training(data, tmp_path, monkeypatch, capsys):
    from store.errors import StoreError

    real = checkpoint.save

    def failing(out, *, step, **rest):
        if step in (4, 8):
            raise StoreError("the bucket answers 503")
        return real(out, step=step, **rest)

    monkeypatch.setattr(checkpoint, "save", failing)
    saves_in_time(monkeypatch)
    assert train("--data", data, "--steps", 12, "--save-every", 4, *SMALL, "--resume", "--out", tmp_path / "out") == 0
    assert capsys.readouterr().err.count("failed, training goes on: the bucket answers 503") == 2
    assert [m.step for m in checkpoint.committed(str(tmp_path / "out"))] == [12]


def hostile(out, part, change):
    """Rewrite a part of the newest checkpoint and its manifest, as someone who knows the format would."""
    from safetensors.torch import load_file, save_file

    from tests.test_checkpoint import rewrite

    folder = out / checkpoint.committed(str(out))[-1].name
    path = folder / part
    if part == "state.json":
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    else:
        named = change(load_file(path))
        path.unlink()
        save_file(named, path)
    parts = json.loads((folder / "MANIFEST.json").read_text())["parts"]
    parts[part] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    rewrite(folder / "MANIFEST.json", parts=parts)


HOSTILE = {
    "short moment": ("optimizer.safetensors", lambda t: {**t, "wpe.weight/exp_avg": torch.zeros(3)}),
    "missing moment": ("optimizer.safetensors", lambda t: {k: v for k, v in t.items() if "wpe" not in k}),
    "missing weight": ("model.safetensors", lambda t: {k: v for k, v in t.items() if "wpe" not in k}),
    "whole numbers": ("model.safetensors", lambda t: {**t, "ln_f.bias": t["ln_f.bias"].long()}),
    "random state": ("rng.safetensors", lambda t: {"cpu": torch.zeros(7, dtype=torch.uint8)}),
    "layers": ("state.json", lambda s: {**s, "config": {**s["config"], "n_layer": 10**9}}),
    "setting": ("state.json", lambda s: {**s, "config": {**s["config"], "lr": "high"}}),
    "unknown setting": ("state.json", lambda s: {**s, "config": {**s["config"], "evil": 1}}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_checkpoint_can_at_worst_be_refused(data, tmp_path, case):
    flags = ("--data", data, "--steps", 2, *SMALL, "--resume", "--out", tmp_path / "out")
    assert train(*flags) == 0
    hostile(tmp_path / "out", *HOSTILE[case])
    error_of(train, *flags)


def test_killed_at_any_moment_of_its_start_it_starts_again(data, tmp_path, monkeypatch):
    from store import fs

    flags = ("--data", data, "--steps", 2, *SMALL, "--resume")
    for write in range(6):
        out, writes = tmp_path / str(write), 0
        real = fs.put_bytes

        def dying(url, content, real=real, limit=write):
            nonlocal writes
            writes += 1
            if writes > limit:
                raise Killed
            real(url, content)

        with monkeypatch.context() as m:
            m.setattr(fs, "put_bytes", dying)
            if write < 3:  # config.json, metrics.jsonl, tokenizer.json; later ones belong to the save
                with pytest.raises(Killed):
                    train(*flags, "--out", out)
        out.mkdir(exist_ok=True)
        (out / ".config.json.1-ab.tmp").write_bytes(b"half")
        assert train(*flags, "--out", out) == 0
        assert not (out / ".config.json.1-ab.tmp").exists()


def test_a_signal_between_micro_batches_leaves_at_once_and_changes_nothing(data, tmp_path, monkeypatch):
    """A step of many micro-batches can outlast the grace: it is dropped, and done again on resume, to the bit."""
    flags = ("--data", data, "--steps", 8, "--micro-batch", 2, "--dropout", 0.1, *SMALL, "--resume")
    assert train(*flags, "--out", tmp_path / "quiet") == 0
    real = run.train_step

    def interrupted(*args, stop, **kwargs):
        asked = 0

        def stop_at_third():
            nonlocal asked
            asked += 1
            if asked == 3 and stepped == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            return stop()

        nonlocal stepped
        out = real(*args, stop=stop_at_third, **kwargs)
        stepped += 1
        return out

    stepped = 0
    with monkeypatch.context() as m:
        m.setattr(run, "train_step", interrupted)
        assert train(*flags, "--out", tmp_path / "killed") == 75
    assert checkpoint.committed(str(tmp_path / "killed"))[-1].step == 5
    assert train(*flags, "--out", tmp_path / "killed") == 0
    assert result(tmp_path / "killed") == result(tmp_path / "quiet")


def test_a_second_trainer_in_one_folder_is_refused(data, tmp_path):
    flags = ("--data", data, *SMALL, "--resume", "--out", tmp_path / "out", "--log-every", 1)
    first = start("train/run.py", *flags, "--steps", 100_000)
    assert wait_for_step(tmp_path / "out", 3, first)
    assert "another process is writing there" in error_of(train, *flags, "--steps", 5)
    first.kill()
    first.wait()
    assert train(*flags, "--steps", 5) == 0  # a killed trainer holds nothing


def test_a_reader_that_goes_away_does_not_end_training(data, tmp_path):
    import subprocess

    line = command("train/run.py", "--data", data, "--steps", 40, *SMALL, "--out", tmp_path / "out", "--log-every", 1)
    process = subprocess.Popen(line, stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 0
    assert checkpoint.committed(str(tmp_path / "out"))[-1].step == 40


def test_begun_without_a_checkpoint_it_goes_on_with_its_settings(data, tmp_path, monkeypatch):
    train_until_killed(monkeypatch, 3, "--data", data, "--steps", 6, *SMALL, "--resume", "--out", tmp_path / "out")
    assert train("--data", data, "--resume", "--out", tmp_path / "out", "--lr", 1e-4) == 0
    found = checkpoint.load(str(tmp_path / "out"), checkpoint.committed(str(tmp_path / "out"))[-1])
    assert (found.state["model"]["n_embd"], found.state["config"]["lr"], found.state["step"]) == (32, 1e-4, 6)


def test_a_lost_config_json_does_not_lose_the_checkpoints(data, tmp_path):
    flags = ("--data", data, *SMALL, "--resume", "--out", tmp_path / "out")
    assert train(*flags, "--steps", 4) == 0
    (tmp_path / "out" / "config.json").unlink()
    assert train(*flags, "--steps", 8) == 0
    assert [m["step"] for m in result(tmp_path / "out")["metrics"] if "loss" in m] == list(range(1, 9))


def test_nohup_is_respected(data, tmp_path):
    import subprocess

    command_line = command(
        "train/run.py", "--data", data, "--steps", 600, *SMALL, "--out", tmp_path / "out", "--log-every", 1
    )
    process = subprocess.Popen(["nohup", *command_line], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert wait_for_step(tmp_path / "out", 3, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0


def test_an_outage_at_a_sample_or_for_the_log_does_not_stop_training(data, tmp_path, monkeypatch, capsys):
    from store import fs
    from store.errors import StoreError

    real = fs.put_bytes

    def away(url, content):
        if "/samples/" in url:
            raise StoreError("the bucket answers 503")
        real(url, content)

    monkeypatch.setattr(fs, "put_bytes", away)
    flags = ("--data", data, "--steps", 6, *SMALL, "--resume", "--out", tmp_path / "out", "--sample-every", 3)
    assert train(*flags) == 0
    assert "samples of step 3 were not kept: the bucket answers 503" in capsys.readouterr().err


def test_a_longer_run_does_not_warm_up_again(data, tmp_path):
    flags = ("--data", data, *SMALL, "--resume", "--out", tmp_path / "out")
    assert train(*flags, "--steps", 60) == 0
    assert train(*flags, "--steps", 600, "--schedule", "cosine", "--log-every", 1, "--eval-every", 0) == 0
    rates = [m["lr"] for m in result(tmp_path / "out")["metrics"] if "lr" in m]
    assert rates[60] > rates[59]  # the cosine is stretched, as asked
    assert all(a >= b for a, b in itertools.pairwise(rates[60:]))  # and only falls from there


def test_divergence_stops_with_the_last_good_checkpoint_intact(data, tmp_path):
    flags = ("--data", data, "--steps", 40, "--save-every", 5, *SMALL, "--resume", "--log-every", 1)
    assert train(*flags, "--lr", "1e17", "--clip", 0, "--warmup", 0, "--out", tmp_path / "out") == run.DIVERGED
    for manifest in checkpoint.committed(str(tmp_path / "out")):
        found = checkpoint.load(str(tmp_path / "out"), manifest)
        assert all(
            t.isfinite().all() for t in found.tensors["model.safetensors"].values() if torch.is_floating_point(t)
        )


def test_runs_do_not_need_this_folder(data, tmp_path):
    process = start("train/run.py", "--data", data, "--steps", 1, *SMALL, "--out", "here", "--resume", cwd=tmp_path)
    assert process.wait(60) == 0
    assert os.path.exists(tmp_path / "here" / "config.json")
