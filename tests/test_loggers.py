"""Other loggers get each step of a run once over all its restarts, never ask anything, and never stop training."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from tests.helpers import start, train
from tests.test_train import QUICK
from train import checkpoint, loggers
from train.config import TrainConfig
from train.folder import RunFolder, read_lines

FLAGS = (*QUICK, "--log-every", 1, "--eval-every", 2, "--save-every", 4, "--keep", 9, "--schedule", "constant",
         "--resume")  # fmt: skip


def killed_and_resumed(data, out, name):
    """Six steps whose last checkpoint is lost, then on from step 4 to step 8. Returns what metrics.jsonl has."""
    assert train("--data", data, "--out", out, *FLAGS, "--steps", 6, "--log-to", name) == 0
    shutil.rmtree(out / checkpoint.committed(str(out))[-1].name)
    assert train("--data", data, "--out", out, *FLAGS, "--steps", 8) == 0  # --log-to is remembered
    assert [e["step"] for e in read_lines(out / "events.jsonl") if e["event"] == "start"] == [0, 4]
    return read_lines(out / "metrics.jsonl")


def test_tensorboard_shows_every_step_once(data, tmp_path):
    """As TensorBoard itself reads the folder."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = killed_and_resumed(data, tmp_path / "out", "tensorboard")
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    for key in ("loss", "val_loss", "lr"):
        shown = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in board.Scalars(loggers.NAMES[key])]
        assert shown == [(m["step"], m[key]) for m in metrics if key in m]
    assert [e.step for e in board.Scalars("train/loss")] == list(range(1, 9))
    assert "speed/tokens_per_s" in board.Tags()["scalars"]


class Service:
    """Stands for wandb and trackio: keeps all it is sent."""

    def __init__(self, name: str) -> None:
        self.name, self.sent, self.asked, self.finished = name, [], [], 0

    def init(self, **options):
        self.asked.append(options)
        return SimpleNamespace(
            log=lambda values, step: self.sent.append((step, values)), finish=self.finish, dir="", url=""
        )

    def finish(self) -> None:
        self.finished += 1

    def Settings(self, **options):
        return options


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_are_sent_every_step_once_under_one_id(data, tmp_path, monkeypatch, name):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    metrics = killed_and_resumed(data, tmp_path / "out", name)
    for key in ("loss", "val_loss"):
        sent = [(step, values[loggers.NAMES[key]]) for step, values in service.sent if loggers.NAMES[key] in values]
        assert sent == [(m["step"], m[key]) for m in metrics if key in m]
    steps = [step for step, _ in service.sent]
    assert steps == sorted(steps)  # wandb drops what comes later for an earlier step
    first, second = ({k: o.get(k) for k in ("id", "name", "resume")} for o in service.asked)
    assert first == second
    assert first["resume"] == "allow"
    assert service.finished == 2


def test_wandb_offline_for_real(data, tmp_path, monkeypatch):
    """No key, no network, nobody to answer: it logs into OUT/wandb, and says so."""
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    job = start(
        "train/run.py", "--data", data, "--out", tmp_path / "out", *QUICK, "--log-to", "wandb", stdin=-3, stdout=-1
    )
    told, _ = job.communicate(timeout=120)
    assert job.returncode == 0
    assert "log        wandb offline: " in told
    assert "set WANDB_API_KEY" in told
    run_id = json.loads((tmp_path / "out" / "config.json").read_text())["run_id"]
    assert list((tmp_path / "out" / "wandb").glob(f"offline-run-*-{run_id}/*.wandb"))


def test_a_key_is_looked_for_without_asking(tmp_path, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    assert not loggers.wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert loggers.wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not loggers.wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert loggers.wandb_key()


def test_what_is_not_installed_is_one_line(data, tmp_path, monkeypatch, capsys):
    """Asked for now: an error before anything is written. Remembered from another machine: a warning."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        train("--data", data, "--out", tmp_path / "out", *QUICK, "--log-to", "wandb")
    assert ended.value.code == 2
    assert "wandb is not installed: pip install wandb" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train("--data", data, "--out", tmp_path / "out", *QUICK, "--log-to", "tensorbord")
    assert "'tensorbord' is no logger: choose from tensorboard, wandb, trackio, none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    folder = RunFolder(str(tmp_path / "out"))
    loggers.attach(TrainConfig(log_to=("wandb", "none")), folder, 0)
    assert folder.watchers == []
    assert "--log-to wandb: not installed here" in capsys.readouterr().err


def test_one_that_fails_is_told_no_more(tmp_path, capsys):
    """Training goes on without it; the others are told."""
    folder, told = RunFolder(str(tmp_path)), []

    class Bad:
        def metrics(self, lines):
            raise ConnectionError("the service\nis away")

    class Good:
        def metrics(self, lines):
            told.extend(lines)

    folder.watchers += [Bad(), Good()]
    for step in (1, 2):
        folder.metrics([{"step": step, "loss": 1.0}])
    assert told == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
    assert capsys.readouterr().err.count("Bad failed and is told no more (ConnectionError: the service is away)") == 1
