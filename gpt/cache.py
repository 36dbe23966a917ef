"""What a model remembers of the positions it has seen: their keys and values, and which of them each row may look at."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt.errors import GPTError
from gpt.model import GPTConfig


class KVCache:
    """Keys and values of the positions a model has seen, for rows of differing length.

    Allocated once, 2 * n_layer * batch * block_size * n_embd numbers. Row b holds lengths[b] positions; what lies
    beyond them (padding of a ragged prefill) is never attended to, and is overwritten as the row grows.
    """

    def __init__(self, config: GPTConfig, batch: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (config.n_layer, batch, config.n_head, config.block_size, config.head_width)  # (L, B, H, S, D)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        self.lengths = [0] * batch  # on the host: the loop below knows them, the device need never be asked

    def advance(self, T: int) -> Tensor:
        """Make room for T more positions in every row; returns their position numbers, (B, T)."""
        self.make_room(T)
        device = self.k.device
        self.positions = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(T, device=device)  # (B, T)
        self.level = min(self.lengths) == max(self.lengths)
        self.causal = max(self.lengths) == 0 and T > 1
        self.lengths = [length + T for length in self.lengths]
        self.used = max(self.lengths)
        # A key is visible to its own and later positions: (B, 1, T, S). This hides another row's longer tail too. None
        # where `causal` says the same, or where one position sees all there are: torch has faster kernels for these.
        maskless = self.causal or (self.level and T == 1)
        keys = torch.arange(self.used, device=device)
        self.mask = None if maskless else (keys <= self.positions[:, :, None])[:, None]
        return self.positions

    def make_room(self, T: int) -> None:
        """Raises GPTError where T more positions do not fit."""
        if max(self.lengths) + T > self.k.shape[3]:
            raise GPTError(f"{max(self.lengths)} + {T} positions exceed the cache's {self.k.shape[3]}: prefill again")

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store one layer's new keys and values (B, H, T, D); returns all of them so far, (B, H, S, D)."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]  # (B, 1) against positions (B, T)
        for store, new in ((self.k[layer], k), (self.v[layer], v)):
            if self.level:
                store[:, :, self.used - new.shape[2] : self.used] = new
            else:
                store[rows, :, self.positions] = new.transpose(1, 2).to(store.dtype)  # (B, T, H, D)
        return self.k[layer, :, :, : self.used], self.v[layer, :, :, : self.used]

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget what each row holds beyond its length."""
        self.lengths = list(lengths)

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all other rows."""
        index = torch.tensor(rows, device=self.k.device)
        self.k, self.v = self.k[:, index], self.v[:, index]
        self.lengths = [self.lengths[row] for row in rows]
