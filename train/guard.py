"""Numbers that are no numbers: which steps were left out, when that is too much, and what to say then.

A step whose loss or gradient is not finite changes nothing: the device itself leaves it out (`step_unless` in
train/optim.py), so the host never waits to find out. What happened is read here, with the log lines.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

SMALLEST_SCALE = 2.0**-10  # 26 halvings from GradScaler's start: no healthy run comes near
SPIKE_SIGMAS = 5.0
MEMORY = 0.98  # of the running mean and variance: about the last 50 losses
LEAST_LOSSES = 100  # before a spike can be told from the fall of the first steps
LEAST_SIGMA = 0.01  # of the mean: a run of nearly equal losses has no spikes


@dataclass
class Guard:
    """Sees every step's loss and gradient norm, in order, and decides when training cannot go on.

    `skipped` and `in_a_row` are part of a checkpoint: a resumed run stops where an uninterrupted one would.
    """

    max_skipped: int
    skipped: int = 0  # steps of the whole run that were left out, fp16 overflows not counted
    in_a_row: int = 0  # the newest of them
    fault: str | None = None  # why to stop
    last_good: tuple[int, float] | None = None  # step and loss
    mean: float = field(default=0.0, repr=False)
    variance: float = field(default=0.0, repr=False)
    losses: int = field(default=0, repr=False)

    def see(self, rows: list[tuple[int, float, float]], scale: float | None) -> list[str]:
        """Take in (step, loss, norm) rows and the loss scale after them (None: not fp16). Returns what to warn of."""
        skipped, spikes = [], []
        for step, loss, norm in rows:
            if math.isfinite(loss) and math.isfinite(norm):
                self.in_a_row, self.last_good = 0, (step, loss)
                if self._is_spike(loss):
                    spikes.append((step, loss, self.mean))
                self._remember(loss)
            elif scale is None or not math.isfinite(loss):  # else an overflow: the scaler halves its scale
                skipped.append(step)
                self.skipped += 1
                self.in_a_row += 1
                if self.in_a_row >= self.max_skipped and self.fault is None:
                    self.fault = (f"the loss or gradient was not a number at {self.in_a_row} steps in a row, "
                                  f"up to step {step} (--max-skipped {self.max_skipped})")  # fmt: skip
        if scale is not None and scale < SMALLEST_SCALE and self.fault is None:
            self.fault = f"the fp16 loss scale fell to {scale:.1e} by step {rows[-1][0]}: every gradient overflows"
        return [*self._about(skipped), *_about_spikes(spikes)]

    def look_at(self, model: nn.Module) -> None:
        """Before the last save, whose weights no further step would try: find a fault in the weights themselves."""
        wrong = first_nonfinite(dict(model.named_parameters()))
        if wrong and self.fault is None:
            self.fault = f"the last step left {wrong} not finite"

    def record(self) -> dict[str, int]:
        """What state.json keeps."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load(self, record: dict[str, int]) -> None:
        """Go on from `record`, or from nothing where an older checkpoint has none."""
        self.skipped, self.in_a_row = record.get("skipped", 0), record.get("in_a_row", 0)

    def _about(self, skipped: list[int]) -> list[str]:
        if not skipped:
            return []
        which = f"step {skipped[0]}" if len(skipped) == 1 else f"{len(skipped)} steps, {skipped[0]} to {skipped[-1]},"
        return [f"{which} left out: loss or gradient not a number ({self.in_a_row} in a row, "
                f"{self.max_skipped} stop training)"]  # fmt: skip

    def _is_spike(self, loss: float) -> bool:
        sigma = max(math.sqrt(self.variance), LEAST_SIGMA * abs(self.mean))
        return self.losses >= LEAST_LOSSES and loss > self.mean + SPIKE_SIGMAS * sigma

    def _remember(self, loss: float) -> None:
        """Exponentially weighted mean and variance (Finch 2009), as a plain average while there are few."""
        self.losses += 1
        weight = max(1 / self.losses, 1 - MEMORY)
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)


def _about_spikes(spikes: list[tuple[int, float, float]]) -> list[str]:
    if not spikes:
        return []
    step, loss, mean = max(spikes, key=lambda s: s[1])
    more = f" and {len(spikes) - 1} more" if len(spikes) > 1 else ""
    return [
        f"loss spike: {loss:.4f} at step {step}{more}, over {SPIKE_SIGMAS:g} sigma above the recent mean {mean:.4f}"
    ]


def first_nonfinite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or an infinity, or None.

    One pass without temporaries: NaN goes through `aminmax` (29 GB/s on one core; `isfinite().all()` 0.5).
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            return name
    return None


def is_finite(tensor: Tensor) -> bool:
    """False where there is a NaN or an infinity."""
    return not tensor.is_floating_point() or not tensor.numel() or largest(tensor) < math.inf


def largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    least, most = tensor.detach().aminmax()
    return float(torch.maximum(-least, most))
