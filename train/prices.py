"""What GPUs can do and what they cost: the one table to bring up to date. `--price-per-hour` goes before it."""

from dataclasses import dataclass

from train.precision import PEAK_FLOPS


@dataclass(frozen=True)
class Gpu:
    """One kind of rented GPU. `mfu` is assumed: the share of the peak that small GPTs reach here, compiled."""

    name: str  # as torch reports it, in part
    memory: float  # bytes
    precision: str
    mfu: float
    price_per_hour: float  # US dollars, on demand
    price_of: str  # whose price, and when it was looked up

    @property
    def peak_flops(self) -> float:
        """Dense FLOP/s in its 16-bit format."""
        return PEAK_FLOPS[self.name]


# Prices go stale within months: look at your provider's page. Colab's unit cost 0.0999 dollars (100 for 9.99).
GPUS = (
    Gpu("T4", 15e9, "fp16", 0.25, 0.11, "Colab, 1.07 units an hour, 2026-09"),
    Gpu("L4", 24e9, "bf16", 0.35, 0.44, "RunPod, 2026-03"),
    Gpu("A100", 80e9, "bf16", 0.40, 1.39, "RunPod, 80 GB SXM, 2026-03"),
    Gpu("H100", 80e9, "bf16", 0.35, 2.69, "RunPod, 80 GB SXM, 2026-03"),
)
