"""Batches of two datasets: most windows of the one that is learnt, a share of what was learnt before.

Which rows of a step are replayed is a function of the step alone, which windows they are one of seed and step, as in
train/batches.py: nothing to save, nothing to lose, and each dataset is still read once per epoch of its own.
"""

import numpy as np

from train.batches import Batches


class MixedBatches(Batches):
    """`main`, with the last rows of each batch from `replay`: over all steps the `share` of them, 0 to below 1."""

    def __init__(self, main: Batches, replay: Batches, share: float) -> None:
        self.main, self.replay, self.share = main, replay, share
        self.batch, self.block_size, self.order = main.batch, main.block_size, main.order

    @property
    def windows_per_epoch(self) -> int:
        """Windows of both kinds that are read in one pass over the main dataset."""
        return round(self.main.windows_per_epoch / (1 - self.share))

    def replayed(self, step: int) -> int:
        """How many rows of this step's batch, its last ones, are replayed."""
        return self.replay_position(step + 1) - self.replay_position(step)

    def replay_position(self, step: int) -> int:
        """How many windows of the replayed dataset the steps before `step` read."""
        return int(step * self.batch * self.share)

    def position(self, step: int) -> int:
        """How many windows of the main dataset the steps before `step` read."""
        return step * self.batch - self.replay_position(step)

    def batch_at(self, step: int) -> np.ndarray:
        """(batch, block_size + 1) ids of 0-based `step`, the replayed rows last."""
        both = ((self.main, self.position), (self.replay, self.replay_position))
        return np.concatenate([b.windows(at(step), at(step + 1)) for b, at in both if at(step) < at(step + 1)])
