"""Metrics in TensorBoard, Weights & Biases and Trackio too: never asking anything, and each step of a run once.

A run has one id over all its restarts. What a killed attempt had logged after its last checkpoint is trained, and logged,
again: TensorBoard is told to forget it, the others are not told twice.
"""

import contextlib
import importlib.util
import io
import netrc
import os
from typing import Any
from urllib.parse import urlsplit

from store import fs
from train.config import TrainConfig, stored_form
from train.folder import RunFolder

NAMES = {"loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "val_loss": "val/loss",
         "tokens_per_s": "speed/tokens_per_s"}  # fmt: skip


def attach(config: TrainConfig, folder: RunFolder, step: int) -> None:
    """Have the opened `folder`, whose run goes on from `step`, tell the loggers of --log-to. One that cannot be had is named."""
    makers = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
    for name in config.log_to:
        if name not in makers:
            continue
        if importlib.util.find_spec(name) is None:  # the run began on a machine that had it
            folder.warn(f"--log-to {name}: not installed here (pip install {name}): nothing is logged there")
            continue
        try:
            folder.watchers.append(makers[name](config, folder, step))
        except Exception as e:  # whatever a service's client raises
            folder.warn(f"--log-to {name}: {' '.join(str(e).split())[:200]}: nothing is logged there, training goes on")


class _Scalars:
    """A watcher that hands on numbers by step."""

    def put(self, step: int, values: dict[str, float]) -> None:
        """Numbers of one step, by their name there."""
        raise NotImplementedError

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            values = {NAMES[k]: v for k, v in line.items() if k in NAMES and v is not None}
            if values:
                self.put(line["step"], values)

    def event(self, line: dict[str, Any]) -> None:
        if line["event"] == "progress":
            self.metrics([line])


class TensorBoard(_Scalars):
    """Event files in OUT/tensorboard, brought to --out with the logs."""

    def __init__(self, config: TrainConfig, folder: RunFolder, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        again = {"purge_step": step + 1} if folder.logged else {}  # what a killed attempt logged after it is not shown
        self.writer = SummaryWriter(str(folder.local / "tensorboard"), **again)
        print(f"log        tensorboard --logdir {fs.redact(fs.join(folder.url, 'tensorboard'))}", flush=True)

    def put(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        super().metrics(lines)
        self.writer.flush()  # a killed process loses what its writer still holds

    def sample(self, step: int, text: str) -> None:
        self.writer.add_text("sample", text, step)

    def close(self) -> None:
        self.writer.close()


class _Once(_Scalars):
    """Services that keep every line they are sent: what an earlier attempt has sent is left out."""

    def __init__(self, folder: RunFolder) -> None:
        self.logged = dict(folder.logged)

    def metrics(self, lines: list[dict[str, Any]]) -> None:
        loss = self.logged.get("loss", 0)

        def new(line: dict[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in line.items() if k == "step" or line["step"] > self.logged.get(k, loss)}

        super().metrics([new(line) for line in lines])

    def sample(self, step: int, text: str) -> None:
        """Samples are kept in OUT/samples."""


class Wandb(_Once):
    """Weights & Biases: online with a key, else offline files in OUT/wandb for `wandb sync`. Never a prompt."""

    def __init__(self, config: TrainConfig, folder: RunFolder, step: int) -> None:
        super().__init__(folder)
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if wandb_key() else "offline")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "perennial"), id=folder.run_id, resume="allow", mode=mode,
            dir=str(folder.local), config=stored_form(config),
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )  # fmt: skip
        where = f"wandb {self.run.url}" if mode == "online" else f"wandb {mode}: {self.run.dir}"
        hint = "" if mode != "offline" or os.environ.get("WANDB_MODE") else " (no key: set WANDB_API_KEY)"
        print(f"log        {where}{hint}", flush=True)

    def put(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


def wandb_key() -> bool:
    """Whether Weights & Biases would find a key without asking: in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


class Trackio(_Once):
    """Trackio's database on this machine, or the Space that TRACKIO_SPACE_ID names."""

    def __init__(self, config: TrainConfig, folder: RunFolder, step: int) -> None:
        super().__init__(folder)
        import trackio

        project = os.environ.get("TRACKIO_PROJECT", "perennial")
        with contextlib.redirect_stdout(io.StringIO()):  # its banner
            self.run = trackio.init(project=project, name=folder.run_id, resume="allow", config=stored_form(config))
        print(f"log        trackio show --project {project}: run {folder.run_id}", flush=True)

    def put(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()
