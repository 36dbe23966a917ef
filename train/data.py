"""The dataset a run trains on: opened at once, its shards brought into memory or memory-mapped while it trains."""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.errors import UserError
from gpt.tokenizer import Tokenizer
from store import drive, fs
from store.shards import Loading, Shard, TokenShards, default_cache
from train.batches import Batches, WindowOrder, validation_grid
from train.config import TrainConfig, on_colab
from train.replay import MixedBatches
from train.staging import StagedShards, Staging

LOOK_TOKENS = 1 << 16


@dataclass
class Data:
    """A dataset, its shards known by their metadata and brought from `begin` on."""

    tokens: TokenShards
    tokenizer: Tokenizer
    staging: Staging
    train: StagedShards
    val: StagedShards
    replay: "Data | None" = None  # the second dataset, of which only the training split is read
    chat: bool = False  # whether it holds conversations: known from `ready` on
    first: list[Shard] = field(default_factory=list)  # what the first step cannot go without

    def begin(self, config: TrainConfig, batches: Batches, step: int, total: int) -> None:
        """Start to bring the shards that steps `step` … `total` - 1 and validation read, in the order of their reading."""
        grid = validation_grid(self.val.lengths, block_size=config.block_size, tokens=config.eval_tokens)
        val = [self.val.shards[i] for i in dict.fromkeys(shard for shard, _ in grid)] if step < total else []
        self._bring(batches.order, batches.position, step, total, val)
        if self.replay:
            self.replay._bring(batches.replay.order, batches.replay_position, step, total, [])

    def _bring(
        self, order: WindowOrder, position: Callable[[int], int], step: int, total: int, also: list[Shard]
    ) -> None:  # fmt: skip
        """Start to bring `also`, then the shards of the windows at positions [position(step), position(total))."""

        def visits(end: int) -> Iterator[Shard]:
            windows = order.shards_between(position(step), position(end))
            return itertools.chain(also, (self.train.shards[i] for i in windows))

        self.first = list(dict.fromkeys(visits(min(step + 1, total))))
        self.staging.begin(visits(total))

    def ready(self, told_to_stop: Callable[[], bool]) -> bool:
        """Wait until the first step can go; False when told to stop before that."""
        there = False
        try:
            there = self.staging.wait(self.first, told_to_stop) and (not self.replay or self.replay.ready(told_to_stop))
        finally:
            if not there:
                self.close()
        if there and self.first:  # documents are shuffled: the beginning of any shard tells what they are
            begins = self.staging.arrays[self.first[0].name][:LOOK_TOKENS]
            self.chat = bool((begins == self.tokenizer.role_id("user")).any())
        return there

    def batches(self, config: TrainConfig) -> Batches:
        """Which windows each step trains on. Raises UserError where the data does not fill one batch."""
        named = {"block_size": config.block_size, "batch": config.batch, "seed": config.seed, "stride": config.stride}
        main = Batches(self.train, lengths=self.train.lengths, **named)
        if not self.replay:
            return main
        return MixedBatches(
            main, Batches(self.replay.train, lengths=self.replay.train.lengths, **named), config.replay_share
        )

    def record(self) -> dict[str, Any]:
        """What state.json keeps: a run goes on with the same tokens or not at all."""
        mine = {"fingerprint": self.tokens.fingerprint, "vocab_size": self.tokens.vocab_size}
        return mine | ({"replay": self.replay.tokens.fingerprint} if self.replay else {})

    def close(self) -> None:
        """End the threads that bring shards."""
        self.staging.close()
        if self.replay:
            self.replay.close()


def open_data(config: TrainConfig, tokenizer: Tokenizer | None = None, *, copies: int = 1) -> Data:
    """The dataset, `copies` times on this machine, none of its shards there yet: their sizes alone are checked. Every byte is verified before it is used.

    Raises UserError where it, or the one to replay, is not in the ids of `tokenizer`, that of the weights to begin with.
    """
    data = _open(config.data, config, copies)
    if config.replay:
        data.replay = _open(config.replay, config, copies)
    for one in (data, data.replay):
        if one and (tokenizer or data.tokenizer).vocabulary != one.tokenizer.vocabulary:
            whose = "the run of --init-from" if tokenizer else config.data
            raise UserError(f"{fs.redact(one.tokens.url)}: its ids are not those of {fs.redact(whose)}: make it with "
                            "prep/tokenize_bpe.py --tokenizer, naming the tokenizer.json there")  # fmt: skip
    return data


def _open(url: str, config: TrainConfig, copies: int) -> Data:
    if not fs.exists(fs.join(url, "metadata.json")):
        mount = (
            "mount your Drive first (drive.mount in a cell of its own), or "
            if on_colab() and not drive.mounted(drive.MOUNT / "MyDrive")
            else ""
        )
        raise UserError(f"{fs.redact(url)}: no token dataset there (no metadata.json): {mount}make one with "
                        "`python prep/tokenize_bpe.py --input corpus.txt --compress`, and name it with --data")  # fmt: skip
    tokens = TokenShards(url, cache=(config.cache_folder or default_cache()) / "shards")
    tokenizer = Tokenizer(tokens.tokenizer_json())
    if tokenizer.vocab_size != tokens.vocab_size:
        raise UserError(f"{fs.redact(url)}: tokenizer.json has {tokenizer.vocab_size} ids, metadata.json says "
                        f"{tokens.vocab_size}: re-run prep")  # fmt: skip
    tokens.check_sizes()
    raw_bytes = sum(s.tokens for s in tokens.shards) * tokens.dtype.itemsize
    staging = Staging(tokens, preload=choose_preload(config.loading, copies * raw_bytes), limit=config.cache_limit)
    train, val = (StagedShards(staging, tokens.split(split)) for split in ("train", "val"))
    return Data(tokens, tokenizer, staging, train, val)


def same_data(stored: dict[str, Any], data: Data) -> None:
    """Refuse to go on with another dataset than the checkpoint's: its order of tokens would mean nothing here."""
    tokens, replay = data.tokens, data.replay
    if stored["data"]["vocab_size"] != tokens.vocab_size:
        raise UserError(f"{fs.redact(tokens.url)}: has a vocabulary of {tokens.vocab_size}, the checkpoint one of "
                        f"{stored['data']['vocab_size']}: give the data it was trained on, or another --out")  # fmt: skip
    if not stored["data"]["fingerprint"]:  # imported weights: any data in their tokenizer's ids will do
        if stored["data"].get("tokenizer_sha256") != tokens.metadata["tokenizer_sha256"]:
            raise UserError(f"{fs.redact(tokens.url)}: was made with another tokenizer than the imported model's: re-run "
                            "prep with --tokenizer RUN/tokenizer.json")  # fmt: skip
    elif stored["data"]["fingerprint"] != tokens.fingerprint:
        raise UserError(f"{fs.redact(tokens.url)}: is not the dataset this run was trained on (its tokens differ): "
                        "give that one, or another --out")  # fmt: skip
    if replay and stored["data"].get("replay") != replay.tokens.fingerprint:
        raise UserError(f"{fs.redact(replay.tokens.url)}: is not what this run replays (its tokens differ): give that one "
                        "with --replay, or another --out")  # fmt: skip


def choose_preload(loading: Loading, raw_bytes: int) -> bool:
    """Whether to hold `raw_bytes` in memory: as told, or (auto) when that takes at most a third of what is free."""
    if loading != "auto":
        return loading == "preload"
    return raw_bytes <= max(available_bytes() // 3, 256 << 20)


def available_bytes() -> int:
    """Memory that can be had: the kernel's estimate (page cache can be given up), and a container's own limit."""
    limits = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        meminfo = Path("/proc/meminfo").read_text()
        limits.append(int(meminfo.split("MemAvailable:")[1].split()[0]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(limits) if limits else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
