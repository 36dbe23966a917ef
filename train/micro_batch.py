"""How many sequences go through the model at once: as many as fit, and fewer once they did not.

The batch of an optimizer step stays what it was: gradients add up over more and smaller micro-batches, so the losses are
the same to rounding. On CUDA the largest size is found by trying real steps and kept in this machine's cache.
"""

import contextlib
import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from cli.errors import UserError
from gpt.model import GPTConfig
from store import fs
from store.errors import StoreError
from store.shards import default_cache
from store.untrusted import parse_json
from train.config import AUTO, TrainConfig
from train.folder import RunFolder
from train.optim import step_unless
from train.parallel import ALONE, Ranks
from train.precision import Machine
from train.state import State

T = TypeVar("T")

MOST_TOKENS = 1 << 16  # at once, unless told otherwise: GPUs are full well before
CPU_TOKENS = 8192  # beyond this a CPU only loses cache
SPARE = 0.03  # of a GPU's memory, held while sizes are tried: for fragmentation, and for samples
# in what CUDA, MPS, the CPU's allocator, cuBLAS and cuDNN raise
WORDS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


def can_try(machine: Machine) -> bool:
    """Whether memory that is not there is refused. A CPU's is swapped, or the process is killed."""
    return machine.device.type == "cuda"


def is_out_of_memory(error: BaseException) -> bool:
    """True for what a device raises when its memory does not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
    )


class MicroBatch:
    """The size in use. `run` makes it smaller, and as a last resort has activations recomputed, when memory ends."""

    def __init__(
        self, config: TrainConfig, state: State, machine: Machine, folder: RunFolder, ranks: Ranks = ALONE
    ) -> None:
        self.state, self.machine, self.folder, self.ranks = state, machine, folder, ranks
        self.batch = config.batch // ranks.world  # this rank's rows of it
        self.optimizer = config.optimizer
        self.told = config.micro_batch != AUTO
        self.fault: UserError | None = None  # memory ended, and nothing is left to be made smaller
        self.may_recompute = config.checkpoint_activations == AUTO
        state.model.recompute = config.checkpoint_activations == "on"
        self.note = _note_path(config, state.model.config, machine, ranks)
        if self.told:
            self.size = min(config.micro_batch, self.batch)
        elif can_try(machine):
            find = self._estimated if ranks.sharded else self._tried
            size = self._remembered() or find(MOST_TOKENS // config.block_size)
            self.size = ranks.least(size)
            state.model.recompute = ranks.any(state.model.recompute)
            self._remember()
        else:
            self.size = largest_divisor(self.batch, CPU_TOKENS // config.block_size)

    def run(self, action: Callable[..., T], *args: Any, **options: Any) -> T | None:
        """action(*args, **options, micro_batch=size). Where memory ends in it, the same again with a smaller size, from the
        same random state; None, and `fault` says why, when nothing is left to be made smaller.

        `action` may change nothing but gradients and random state before it has all the memory it needs.
        """
        while True:
            before = self.machine.rng_tensors()
            try:
                return action(*args, **options, micro_batch=self.size)
            except Exception as e:
                if not is_out_of_memory(e):
                    raise
            # here the error is gone, and with it the frames it came through, which held every tensor of that try
            self._forget_try(before)
            was = self._words()
            if not self._make_smaller():
                self.fault = self._no_room()
            if self.ranks.world > 1:
                raise self.fault or self._start_anew(was)
            if self.fault:
                return None
            self.folder.warn(f"out of memory with {was}: goes on with {self._words()} from the same step")
            self.folder.event("out_of_memory", step=self.state.step, micro_batch=self.size,
                              recompute=self.state.model.recompute)  # fmt: skip

    def _start_anew(self, was: str) -> UserError:
        """The other ranks are in the middle of this step, and wait for this one's gradients: all have to begin again."""
        kept = can_try(self.machine) and not self.told
        return UserError(f"out of memory with {was} on rank {self.ranks.rank}: the same command with --resume "
                         f"{f'takes {self._words()} from now on' if kept else f'and --micro-batch {self.size} goes on'}")  # fmt: skip

    def _make_smaller(self) -> bool:
        if self.size > 1:
            self.size = largest_divisor(self.batch, self.size // 2)
        elif self.may_recompute and not self.state.model.recompute:
            self.state.model.recompute = True
        else:
            return False
        if self.machine.compile:
            # a second size would be compiled for sizes of every kind, which is slower: compile for this one alone
            torch.compiler.reset()
        self._remember()
        return True

    def _words(self) -> str:
        return f"micro-batch {self.size}" + (" and activations recomputed" if self.state.model.recompute else "")

    def _no_room(self) -> UserError:
        instead = "--checkpoint-activations on, " if not self.state.model.recompute else ""
        return UserError(f"out of memory on {self.machine.name} with micro-batch 1"
                         f"{'' if instead else ' and activations recomputed'}: give {instead}a smaller --model or --block-size, "
                         "or a device with more memory")  # fmt: skip

    # ---- trying -----------------------------------------------------------------------------------------------------

    def _ways(self) -> tuple[bool, ...]:
        """Whether to recompute activations: what is allowed, the better way first."""
        return (False, True) if self.may_recompute else (self.state.model.recompute,)

    def _tried(self, at_most: int) -> int:
        """The largest divisor of the batch that fits: without recomputing if any does, it costs a third more computing."""
        began_s = time.monotonic()
        for recompute in self._ways():
            self.state.model.recompute = recompute
            for size in divisors(self.batch, at_most):
                if self._fits(size):
                    seconds = time.monotonic() - began_s
                    self.machine.forget_peak_memory()  # of the tries
                    print(f"memory     micro-batch {size} fits, tried in {seconds:.1f} s", flush=True)
                    return size
        raise self._no_room()

    def _estimated(self, at_most: int) -> int:
        """Where the state is sharded: ranks wait for one another in every layer, so a try that fails on one would hang."""
        from train.estimate import USABLE, memory  # which asks this module what sizes there are

        model, device_bytes = self.state.model, self.machine.memory_bytes()
        for recompute in self._ways():
            model.recompute = recompute
            for size in divisors(self.batch, at_most):
                held = memory(model.config, precision=self.machine.precision, micro_batch=size, optimizer=self.optimizer,
                              recompute=recompute)  # fmt: skip
                state = held.weights + held.gradients + held.moments
                if held.total - state + state / self.ranks.world <= USABLE * device_bytes:
                    return size
        return 1

    def _fits(self, size: int) -> bool:
        """Whether there is the memory for a whole step of this size. Leaves the state as it is, to the bit.

        Not compiled, which would take a minute for each size; compiled code needs less.
        """
        before = self.machine.rng_tensors()
        try:
            self._try(size)
            return True
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            return False
        finally:
            self._forget_try(before)

    def _try(self, size: int) -> None:
        model, optimizer, device = self.state.model, self.state.optimizer, self.machine.device
        ballast = torch.empty(int(SPARE * self.machine.memory_bytes()), dtype=torch.uint8, device=device)
        if self.ranks.world > 1:  # DDP's buckets: gradients of micro-batches before the last are made beside them
            ballast = ballast, torch.empty(sum(p.numel() for p in model.parameters()), device=device)
        ids = torch.zeros((size, model.config.block_size + 1), dtype=torch.int64, device=device)
        # the second pass finds the first one's gradients there; DDP keeps their memory from step to step
        for _ in range(2 if self.ranks.world > 1 else min(2, self.batch // size)):
            with self.machine.autocast():
                loss = model(ids[:, :-1], ids[:, 1:])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step_unless(optimizer, torch.ones((), dtype=torch.bool, device=device))
        self.machine.synchronize()
        del ballast

    def _forget_try(self, rng: dict[str, torch.Tensor]) -> None:
        self.state.optimizer.zero_grad(set_to_none=True)
        scaler = self.state.scaler
        if scaler.is_enabled():  # memory may have ended after its unscale_, which may be called once before an update
            scaler.scale(torch.zeros((), device=self.machine.device))  # it makes its tensors when first used
            scaler.update(scaler.get_scale())
        self.machine.set_rng_tensors(rng)
        gc.collect()  # autograd's graphs can be cycles
        self.machine.free_cached_memory()

    # ---- remembering ------------------------------------------------------------------------------------------------

    def _remember(self) -> None:
        note = {"micro_batch": self.size, "recompute": self.state.model.recompute, "machine": self.machine.name}
        with contextlib.suppress(StoreError):  # then it is tried again
            if can_try(self.machine):
                fs.put_bytes(str(self.note), json.dumps(note).encode())

    def _remembered(self) -> int | None:
        try:
            note = parse_json(self.note.read_bytes())
            size, recompute = int(note["micro_batch"]), note["recompute"] is True
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if size < 1 or (recompute and not (self.may_recompute or self.state.model.recompute)):
            return None
        self.state.model.recompute = recompute or self.state.model.recompute
        return largest_divisor(self.batch, size)


def _note_path(config: TrainConfig, shape: GPTConfig, machine: Machine, ranks: Ranks) -> Path:
    """Where the size is kept; the name holds all that decides which one fits."""
    parts = [asdict(shape), machine.name, machine.memory_bytes(), machine.precision, machine.compile, torch.__version__, config.optimizer,
             config.batch, ranks.world, ranks.sharded, config.lora_rank,
             config.checkpoint_activations == "on"]  # fmt: skip
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    return (config.cache_folder or default_cache()) / "micro-batch" / f"{key}.json"


def divisors(n: int, at_most: int) -> Iterator[int]:
    """The divisors of n that are at most that, largest first; always 1."""
    return (d for d in range(max(1, min(n, at_most)), 0, -1) if n % d == 0)


def largest_divisor(n: int, at_most: int) -> int:
    """The largest divisor of n that is at most that, and at least 1."""
    return next(divisors(n, at_most))
