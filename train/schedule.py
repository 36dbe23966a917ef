"""The learning rate: a pure function of the step, so that nothing about it is saved or lost."""

import math


def learning_rate(
    step: int, *, total: int, peak: float, warmup: int, schedule: str, floor: float, decay_fraction: float
) -> float:
    """Learning rate of 0-based `step` of `total`: linear warm-up to `peak`, then the schedule down to `floor * peak`.

    cosine: half a cosine (Loshchilov & Hutter 2017). linear: a line. constant: peak. wsd: peak, then a line over the last
    `decay_fraction` of the run (Hu et al. 2024). Steps past `total` keep the final value.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    begin = warmup if schedule != "wsd" else max(warmup, round(total * (1 - decay_fraction)))
    progress = min(max((step - begin) / max(total - begin, 1), 0.0), 1.0)
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
    return peak * (1 - (1 - floor) * progress)
