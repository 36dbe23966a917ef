"""What a person sees while it trains, and metrics.jsonl: one line per step, every step once."""

import time
from typing import Any

import torch
from torch import Tensor

from cli.progress import count, duration
from train.folder import RunFolder
from train.precision import Machine


class TrainLog:
    """Collects losses on the device and reads them only when a line is due, so that the loop never waits for them."""

    def __init__(
        self, folder: RunFolder, machine: Machine, *, total: int, tokens_per_step: int, flops_per_token: float,
        steps_per_epoch: float, elapsed_s: float,
    ) -> None:  # fmt: skip
        self.folder, self.machine, self.total, self.tokens_per_step = folder, machine, total, tokens_per_step
        self.flops_per_token, self.steps_per_epoch = flops_per_token, steps_per_epoch
        self.start_s = time.monotonic() - elapsed_s
        self.waiting: list[tuple[int, float, Tensor, Tensor]] = []
        self.line_s, self.paused_s = time.monotonic(), 0.0
        self.tokens_per_s = 0.0

    @property
    def elapsed_s(self) -> float:
        """Seconds of all attempts together, up to now."""
        return time.monotonic() - self.start_s

    def step(self, step: int, lr: float, loss: Tensor, norm: Tensor) -> None:
        """Remember what step number `step` (1 = the first) gave."""
        self.waiting.append((step, lr, loss, norm))

    def flush(self) -> list[float]:
        """Write what is waiting to metrics.jsonl; returns its losses."""
        rows = [(s, lr, float(loss), float(norm)) for s, lr, loss, norm in self.waiting]
        self.waiting = []
        keys = ("step", "lr", "loss", "grad_norm")
        if rows:
            self.folder.metrics([dict(zip(keys, row, strict=True)) for row in rows])
        return [row[2] for row in rows]

    def finite(self, scaled: bool) -> bool:
        """False when a waiting loss or gradient is not a number (a scaled fp16 gradient may be: its step is skipped)."""
        losses = torch.stack([loss for _, _, loss, _ in self.waiting])
        norms = torch.stack([norm for _, _, _, norm in self.waiting])
        return bool(losses.isfinite().all() and (scaled or norms.isfinite().all()))

    def line(self, *, val_loss: float | None) -> None:
        """Print the line of the last step and write the metrics up to it."""
        n = len(self.waiting)
        if not n:
            return
        step, lr, loss, norm = self.waiting[-1]
        loss, norm = float(loss), float(norm)  # the device catches up here: read the clock after it
        now_s = time.monotonic()
        self.tokens_per_s = n * self.tokens_per_step / max(now_s - self.line_s - self.paused_s, 1e-9)
        self.line_s, self.paused_s = now_s, 0.0
        self.flush()
        peak = self.machine.peak_flops()
        parts = [
            f"step {step}/{self.total}",
            f"loss {loss:.4f}",
            *([f"val {val_loss:.4f}"] if val_loss is not None else []),
            f"lr {lr:.2e}",
            f"norm {norm:.2f}",
            f"{count(self.tokens_per_s)} tok/s",
            *([f"mfu {self.tokens_per_s * self.flops_per_token / peak:.1%}"] if peak else []),
            f"epoch {step / self.steps_per_epoch:.2f}",
            duration(self.elapsed_s),
            f"eta {duration((self.total - step) * self.tokens_per_step / self.tokens_per_s)}",
        ]
        print(" | ".join(parts), flush=True)

    def pause(self) -> "_Pause":
        """`with log.pause():` around what is not training, so that tokens/s tells of training."""
        return _Pause(self)

    def validation(self, step: int, val_loss: float) -> None:
        """Record a validation loss."""
        self.folder.metrics([{"step": step, "val_loss": val_loss}])


class _Pause:
    def __init__(self, log: TrainLog) -> None:
        self.log = log

    def __enter__(self) -> None:
        self.log.machine.synchronize()
        self.start_s = time.monotonic()

    def __exit__(self, *error: Any) -> None:
        self.log.paused_s += time.monotonic() - self.start_s
