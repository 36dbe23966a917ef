"""The one integer hash behind every pseudo-random choice that must be the same on every machine, forever."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray | int, seed: int) -> np.ndarray:
    """A uint64 hash of each uint64 in `x` and a seed; one-to-one in `x` (splitmix64, Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        h = np.asarray(x).astype(np.uint64) + np.uint64((seed * 2 + 1) % (1 << 64)) * _GOLDEN
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return h ^ (h >> np.uint64(31))
