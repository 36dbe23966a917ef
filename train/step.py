"""One optimizer step, and one validation: tensors in, tensors out."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from cli.errors import UserError
from train.optim import Optimizer, set_lr, step_unless
from train.parallel import ALONE, Ranks, whole
from train.precision import Machine
from train.targets import EVERY, Targets, counted


def to_device(ids: np.ndarray, machine: Machine) -> Tensor:
    """(n, block + 1) uint16 or uint32 ids -> int64 on the device. Narrow ids travel, the device widens them."""
    # torch has few kernels for unsigned types: the same bits travel as signed and lose their sign once widened
    signed, mask = (np.int16, 0xFFFF) if ids.dtype.itemsize == 2 else (np.int32, 0xFFFFFFFF)
    host = torch.from_numpy(ids.view(signed))
    if machine.device.type == "cuda":
        return host.pin_memory().to(machine.device, non_blocking=True).long() & mask
    return host.to(machine.device).long() & mask  # elsewhere a copy that does not wait can read freed memory (MPS)


def train_step(
    model: nn.Module, forward: Callable[[Tensor, Tensor], Tensor], optimizer: Optimizer,
    scaler: torch.amp.GradScaler, ids: Tensor, *, micro_batch: int, lr: float, clip: float, machine: Machine,
    stop: Callable[[], bool], targets: Tensor | None = None, ranks: Ranks = ALONE,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    """Forward and backward over micro-batches of `ids` (batch, block + 1), clip, step.

    Each rank does its rows of the batch. `targets`: (batch, block), -100 where nothing is to be learnt; None: the next
    ids, all of them. `forward` is the model or its compiled form. Returns the mean loss and the gradient norm before
    clipping, () fp32 on the device: reading them is left to the caller, because it makes the host wait. Where one of
    them is not finite, weights and moments are left as they were. None when `stop` said to leave between two
    micro-batches: then nothing has changed, and the step is still to be done.
    """
    set_lr(optimizer, lr)
    loss = torch.zeros((), device=machine.device)
    before = machine.rng_tensors()
    targets = ids[:, 1:] if targets is None else targets
    learnt = counted(targets).clamp(min=1)
    mine = ranks.rows(len(ids))
    parts = list(zip(ids[mine].split(micro_batch), targets[mine].split(micro_batch), strict=True))
    for i, (part, wanted) in enumerate(parts, 1):
        if stop() and ranks.world == 1:  # a step of many micro-batches can last longer than the grace before the kill
            optimizer.zero_grad(set_to_none=True)
            machine.set_rng_tensors(before)
            return None
        with ranks.syncing(last=i == len(parts)), machine.autocast():
            # each micro-batch counts by the targets in it, so that any size of it gives the same mean; ranks are averaged
            part_loss = forward(part[:, :-1], wanted) * (counted(wanted) * ranks.world / learnt)
        scaler.scale(part_loss).backward()
        loss += part_loss.detach()
    scaler.unscale_(optimizer)
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), clip if clip > 0 else float("inf")))
    loss = ranks.mean(loss)
    try:
        step_unless(optimizer, ~(loss.isfinite() & norm.isfinite()))  # not scaler.step: it looks at gradients alone
    except torch.OutOfMemoryError as e:  # some weights may have moved: this step cannot be done again
        raise UserError("out of memory in the optimizer's step, which no smaller micro-batch helps: run the same command "
                        "with --resume, with a smaller --model or a device with more memory") from e  # fmt: skip
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


@torch.no_grad()
def validation_loss(
    model: nn.Module, windows: np.ndarray, *, micro_batch: int, machine: Machine, stop: Callable[[], bool],
    choose: Targets = EVERY, ranks: Ranks = ALONE,
) -> float | None:  # fmt: skip
    """Mean loss over what is learnt of (n, block + 1) ids, shared out over the ranks; None when there is nothing or `stop`
    says to leave."""
    if not len(windows):
        return None
    model.eval()
    total, sequences = torch.zeros((), device=machine.device), torch.zeros((), device=machine.device)
    try:
        most = -(-len(windows) // ranks.world)  # of a rank: all make as many passes, for a sharded model needs them all
        for part in np.array_split(windows[ranks.rank :: ranks.world], -(-most // micro_batch)):
            if ranks.any(stop()):
                return None
            ids = to_device(part if len(part) else windows[:1], machine)
            targets = choose(ids)
            weight = (
                counted(targets) / targets.shape[1] * (len(part) > 0)
            )  # in whole sequences: n of them count as n exactly
            with machine.autocast():
                total += model(ids[:, :-1], targets) * weight
            sequences += weight
    finally:
        model.train()
    total, sequences = ranks.mean(total), ranks.mean(sequences)
    return float(total / sequences) if sequences else None
