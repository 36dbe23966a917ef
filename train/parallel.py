"""Several processes, one run: `torchrun --nproc-per-node 8 train/run.py …`.

Each process (a rank) computes its share of every batch, and gradients are averaged: all take the same step. Rank 0 alone
holds the lease, writes, and decides what depends on a clock. A state too large for one GPU is sharded over all (FSDP, Zhao
et al., arXiv:2304.11277, as torch.distributed.fsdp.fully_shard). No rank leaves alone, except by dying: then the others end
too, and `torchrun --max-restarts` starts all of them again, from the newest checkpoint.
"""

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cli.errors import UserError
from train.precision import Machine
from train.preempt import StopSignal

T = TypeVar("T")

try:
    PATIENCE = timedelta(seconds=float(os.environ["PERENNIAL_PEER_S"]))
except (KeyError, ValueError):
    PATIENCE = timedelta(minutes=10)  # with a rank that is silent: it may compile, or fetch its data
STATE_BYTES = 16  # of a parameter: weight, gradient and two moments in float32
STATE_SHARE = 0.7  # of a GPU's memory, that the state may take without being sharded


class Lost(Exception):
    """Another rank has died, or is silent."""


class Ranks:
    """The processes of a run: here this one alone. `Torchrun` is the same for several."""

    rank, world, local_rank, local_world = 0, 1, 0, 1
    sharded = False

    @property
    def first(self) -> bool:
        """True in the one process that writes, and decides."""
        return self.rank == 0

    def device(self, asked: str) -> str:
        """The device to use where --device asks for one."""
        return asked

    def rows(self, batch: int) -> slice:
        """This rank's rows of a batch: as many for each. Raises UserError where that cannot be."""
        share, over = divmod(batch, self.world)
        if over:
            raise UserError(f"--batch {batch} over {self.world} processes: expected a multiple of {self.world}: start "
                            f"{max(n for n in range(1, self.world) if batch % n == 0)} with --nproc-per-node, or give another "
                            "--batch to a new run")  # fmt: skip
        return slice(self.rank * share, (self.rank + 1) * share)

    # ---- agreeing: every rank calls these in the same order, or all would wait for one another ---------------------

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        return flag

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers."""
        return number

    def tell(self, value: T) -> T:
        """Rank 0's value, which JSON can hold."""
        return value

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over ranks."""
        return tensor

    def leaving(self, stop: StopSignal, ended: bool) -> bool:
        """Whether to leave the loop: a rank was told to stop (then all are), or has `ended`."""
        return ended or stop()

    @torch.no_grad()
    def load(self, targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
        """Fill live tensors, sharded ones too, from whole ones that rank 0 has."""
        for name, target in targets.items():
            target.copy_(sources[name])

    # ---- the model --------------------------------------------------------------------------------------------------

    def place(self, model: nn.Module, machine: Machine, shard: str) -> nn.Module:
        """The model on its device; sharded as told, or (auto) where its state would not fit."""
        if shard == "on":
            raise UserError("--shard on: this is one process: start several with torchrun, or leave it to auto")
        return model.to(machine.device)

    def averaging(self, forward: nn.Module, machine: Machine) -> nn.Module:
        """`forward`, whose backward pass averages gradients over the ranks where `syncing` says so."""
        return forward

    def syncing(self, last: bool) -> AbstractContextManager:
        """Around a forward pass: with a step's last one its gradients are averaged, and those added up before."""
        return contextlib.nullcontext()

    def seed(self, seed: int, step: int) -> None:
        """Before a step: give each rank a dropout of its own, a function of seed, step and rank, so that there is no
        random state of many to save. One process goes on with the state it has."""


ALONE = Ranks()


class Torchrun(Ranks):
    """The processes that torchrun, or another launcher that sets its variables, has started."""

    def __init__(self, device: str) -> None:
        env = os.environ
        self.rank, self.world = int(env["RANK"]), int(env["WORLD_SIZE"])
        self.local_rank, self.local_world = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
        gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
        if gpus and self.local_world > gpus:
            raise UserError(
                f"torchrun --nproc-per-node {self.local_world}: there are {gpus} GPUs here: one process for each"
            )
        if gpus:
            torch.cuda.set_device(self.local_rank)
        self.forward: nn.parallel.DistributedDataParallel | None = None
        self.model: nn.Module | None = None  # where it is sharded
        # What the host decides goes over gloo: to read a flag on a GPU it would wait for all that is queued there.
        with _peers():
            store = _met(next(dist.rendezvous("env://", timeout=PATIENCE))[0], self.rank, self.world)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus else "gloo",
                store=store,
                rank=self.rank,
                world_size=self.world,
                timeout=PATIENCE,
            )
        if not self.first:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - one of them speaks, for the life of the process

    def device(self, asked: str) -> str:
        return f"cuda:{self.local_rank}" if asked in ("auto", "cuda") and torch.cuda.is_available() else asked

    def any(self, flag: bool) -> bool:
        return bool(self._reduced(int(flag), dist.ReduceOp.MAX))

    def least(self, number: int) -> int:
        return self._reduced(number, dist.ReduceOp.MIN)

    def tell(self, value: T) -> T:
        said = json.dumps(value).encode() if self.first else b""
        n_bytes = torch.tensor(len(said))
        with _peers():
            dist.broadcast(n_bytes, 0)
            text = torch.frombuffer(bytearray(said or bytes(int(n_bytes))), dtype=torch.uint8)
            dist.broadcast(text, 0)
        return json.loads(text.numpy().tobytes())

    def mean(self, tensor: Tensor) -> Tensor:
        with _peers():
            dist.all_reduce(tensor)
        return tensor / self.world

    def leaving(self, stop: StopSignal, ended: bool) -> bool:
        worst = self._reduced(2 if stop() else int(ended), dist.ReduceOp.MAX)
        if worst == 2:
            stop.ask("another process of this run")  # whoever was asked first counts
        return worst > 0

    @torch.no_grad()
    def load(self, targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
        for name, target in targets.items():  # one at a time: all of them together may not fit
            full = torch.empty(target.shape, dtype=target.dtype, device=target.device)
            if self.first:
                full.copy_(sources[name])
            with _peers():
                if _is_sharded(target):
                    from torch.distributed.tensor import distribute_tensor

                    full = distribute_tensor(full, target.device_mesh, target.placements)  # from rank 0
                else:
                    dist.broadcast(full, 0)
            target.copy_(full)

    def place(self, model: nn.Module, machine: Machine, shard: str) -> nn.Module:
        params = sum(p.numel() for p in model.parameters())
        memory = machine.memory_bytes()
        self.sharded = shard == "on" or (
            shard == "auto" and bool(memory) and STATE_BYTES * params > STATE_SHARE * memory
        )
        if not self.sharded:
            return model.to(machine.device)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if machine.dtype == torch.float16:
            raise UserError(
                "--shard with fp16: its loss scale is not agreed over shards: give --precision bf16 or fp32"
            )
        if machine.device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
            raise UserError(f"--shard on: torch {torch.__version__} shards on GPUs only: a later one does on a CPU too")
        with _peers():
            mesh = init_device_mesh(machine.device.type, (self.world,))
            for block in model.blocks:
                if machine.compile:
                    block.compile()  # each alone: the gathering between them is no part of a graph
                fully_shard(block, mesh=mesh)
            self.model = fully_shard(model, mesh=mesh)
        return self.model

    def averaging(self, forward: nn.Module, machine: Machine) -> nn.Module:
        if self.sharded:
            return forward
        # static_graph does not hold: torch 2.6 to 2.13 fail an assertion when the first backward pass is one that does
        # not average (measured). Without it nothing is lost here: every parameter is used in every pass.
        with _peers():
            self.forward = nn.parallel.DistributedDataParallel(
                forward,
                device_ids=[machine.device] if machine.device.type == "cuda" else None,
                gradient_as_bucket_view=True,  # else gradients exist twice
            )
        self._settle(machine)
        return self.forward

    def _settle(self, machine: Machine) -> None:
        """Let DDP arrange its buckets now, which it does after its first averaging pass.

        Among three ranks or more, where a gradient lies in its bucket decides in which order it is summed: the first step
        of a resumed run would be summed otherwise than that of an uninterrupted one (measured with four).
        """
        before = machine.rng_tensors()
        ids = torch.zeros((1, 2), dtype=torch.int64, device=machine.device)
        with _peers(), torch.compiler.set_stance("force_eager"):
            with machine.autocast():
                loss = self.forward(ids[:, :-1], ids[:, 1:])
            loss.backward()
        self.forward.zero_grad(set_to_none=True)
        machine.set_rng_tensors(before)

    def syncing(self, last: bool) -> AbstractContextManager:
        if self.forward is not None and not last:
            return self.forward.no_sync()
        if self.model is not None:
            self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def seed(self, seed: int, step: int) -> None:
        torch.manual_seed(int(np.random.SeedSequence((seed, step, self.rank)).generate_state(1, np.uint64)[0]))

    def _reduced(self, number: int, how: dist.ReduceOp) -> int:
        tensor = torch.tensor(number)
        with _peers():
            dist.all_reduce(tensor, how)
        return int(tensor)


def several() -> bool:
    """Whether a launcher has started more processes than this one for the run."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 and {"RANK", "MASTER_ADDR"} <= os.environ.keys()


def join(device: str) -> Ranks:
    """The ranks of this run, as the launcher's variables tell. Raises UserError, or Lost when they do not all come."""
    return Torchrun(device) if several() else ALONE


def _met(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A part of the launcher's store for the ranks of this start alone, once all of them are there.

    torchrun's store outlives a restart, and holds the addresses of the dead: who read them before they were written anew
    could reach nobody, and the next start too was lost (measured, torch 2.13). So each rank says hello with a name that is
    new, and rank 0 answers it with one for all.
    """
    name = secrets.token_hex(8)
    if rank:
        store.set(f"hello-{rank}", name)
        name = store.get(f"welcome-{name}").decode()
        store.set(f"{name}-{rank}", "here")
        return dist.PrefixStore(name, store)
    until_s = time.monotonic() + PATIENCE.total_seconds()
    while missing := [r for r in range(1, world) if not store.check([f"{name}-{r}"])]:
        for r in missing:
            if store.check([f"hello-{r}"]):  # perhaps that of a dead one, whom the answer does not reach
                store.set(f"welcome-{store.get(f'hello-{r}').decode()}", name)
        if time.monotonic() > until_s:
            raise Lost(f"rank {missing[0]} of {world} has not come")
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every rank calls it."""
    with _peers():
        return tensor.full_tensor() if _is_sharded(tensor) else tensor


def is_lost(error: BaseException) -> bool:
    """True for what is raised when another rank has died; in a backward pass that is whatever the backend raises."""
    return isinstance(error, Lost | dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(
        tensor, "full_tensor"
    )  # a DTensor: importing its module takes a second, which one process need not spend


@contextlib.contextmanager
def _peers() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:
        if not is_lost(e):
            raise
        raise Lost("another process of this run has died, or is silent") from e
