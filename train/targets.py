"""What the loss looks at: every next id, or only what the assistant says."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.loss import IGNORE_INDEX
from gpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class Targets:
    """From ids to targets. `learnt`: the special id that begins a turn to be learnt; None: all of a text is."""

    special: tuple[int, ...] = ()  # the ids that begin or end a turn
    learnt: int | None = None

    def __call__(self, ids: Tensor, replayed: int = 0) -> Tensor:
        """ids (B, T + 1), int64 -> the next ids (B, T), those that are not to be learnt -100.

        An id is learnt where the id before it belongs to an assistant's turn: its first word is, the <|end|> that closes
        it is too, <|assistant|> itself is not. What lies in a window before its first special id is of an unknown turn and is
        not learnt. The last `replayed` rows are learnt whole: they are to keep what was learnt as it was learnt.
        """
        if self.learnt is None:
            return ids[:, 1:]
        # sums, scatter and gather of whole numbers: exact on every device, and none of them lacks these
        # each special id by itself: a tensor of them made here would have the host wait for the device at every step
        begins = functools.reduce(torch.logical_or, (ids == special for special in self.special))  # (B, T + 1)
        turn = begins.cumsum(1)  # its number in the window, 0: begun before it
        learnt = torch.zeros(len(ids), ids.shape[1] + 1, dtype=torch.bool, device=ids.device)  # by that number
        learnt.scatter_(1, turn * begins, ids == self.learnt)
        inside = learnt.gather(1, turn)[:, :-1]  # (B, T)
        whole = torch.arange(len(ids), device=ids.device) >= len(ids) - replayed  # (B,)
        return torch.where(inside | whole[:, None], ids[:, 1:], IGNORE_INDEX)


EVERY = Targets()


def make_targets(loss_on: str, tokenizer: Tokenizer) -> Targets:
    """`all` or `assistant`."""
    if loss_on == "all":
        return EVERY
    return Targets(tuple(tokenizer.special_ids.values()), tokenizer.role_id("assistant"))


def counted(targets: Tensor) -> Tensor:
    """How many of the targets the loss looks at, () int64 on their device."""
    return (targets != IGNORE_INDEX).sum()
