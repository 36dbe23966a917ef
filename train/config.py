"""Every setting of training: one default, in one place; flags are made from it.

A checkpoint's settings win on --resume. The fields in FREE do not change what is learnt from which data in which order
(or, like run length, are meant to be changed), and may be given anew.
"""

import dataclasses
import importlib.util
import os
import typing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cli.errors import UserError
from cli.flags import flag, number, price, seconds, tokens
from gpt.model import GPTConfig
from gpt.presets import preset
from store import drive, fs
from store.errors import DataError

AUTO = "auto"
LOGGERS = ("tensorboard", "wandb", "trackio", "none")


def number_or_auto(text: str) -> int | str:
    """`auto`, or a whole number. Raises ValueError."""
    return AUTO if text == AUTO else number(text)


def logger(text: str) -> str:
    """The name of a logger that is installed, or none. Raises ValueError."""
    if text not in LOGGERS:
        raise ValueError(f"{text!r} is no logger: choose from {', '.join(LOGGERS)}")
    if text != "none" and importlib.util.find_spec(text) is None:
        raise ValueError(f"{text} is not installed: pip install {text}")
    return text


@dataclass(frozen=True)
class TrainConfig:
    """Flags of train/run.py. None means: chosen from the model, the data or the machine, and shown at start."""

    data: str = flag(
        "",
        "folder or URL of a token dataset (default: $PERENNIAL_DATA, a mounted Drive's perennial/data, ./data)",
        env="PERENNIAL_DATA",
    )
    out: str = flag(
        "",
        "folder or URL of the run (default: $PERENNIAL_OUT, a mounted Drive's perennial/out, ./out)",
        env="PERENNIAL_OUT",
    )
    resume: bool = flag(False, "go on from the newest complete checkpoint in --out; start when there is none")
    dry_run: bool = flag(False, "print memory, time, money and what stands in the way, and end; nothing is written")
    preflight: bool = flag(False, "also try three real steps, a save and a restore beside --out, and say go or no go")
    price_per_hour: float | None = flag(None, "what the machine costs, for what is said of money", parse=price)

    model: str = flag(
        "auto",
        "preset: tiny small medium large xlarge gpt2_small gpt2_medium; auto: gpt2_small on a GPU, small elsewhere",
    )
    arch: Literal["gpt2", "modern"] = flag(
        "gpt2", "gpt2, or modern: rotary positions, RMSNorm, QK-norm, SwiGLU, no biases (transformers' Qwen3)"
    )
    init_from: str = flag(
        "",
        "a new run begins with the weights of this one: a run folder or URL, or one checkpoint in it; "
        "its shape and tokenizer bind",
    )
    lora_rank: int = flag(0, "tune only adapters of this rank, beside frozen linear layers; 0: all weights")
    lora_alpha: float = flag(16.0, "adapters count times this / rank")
    n_layer: int | None = flag(None, "layers, instead of the preset's")
    n_head: int | None = flag(None, "attention heads, instead of the preset's")
    n_embd: int | None = flag(None, "width, instead of the preset's")
    n_ff: int | None = flag(None, "width inside the MLP (default: 4 x width; modern: 8/3)")
    block_size: int = flag(512, "context length in tokens")
    stride: int | None = flag(
        None, "tokens from one window of an epoch to the next (default: the block size: no overlap)"
    )
    dropout: float = flag(0.0, "dropout probability")
    bias: bool = flag(True, "biases in linear layers and LayerNorms; modern has none")
    qkv_bias: bool = flag(True, "biases of the query, key and value projections")
    tied: bool = flag(False, "output head shares the embedding's weights")

    loss_on: Literal["all", "assistant"] = flag(
        "all", "assistant: of conversations only what the assistant says is learnt"
    )
    replay: str = flag("", "folder or URL of a second token dataset, what was learnt before, to be kept in mind")
    replay_share: float = flag(0.0, "share of the sequences that come from --replay, such as 0.1")

    steps: int | None = flag(None, "run length in optimizer steps")
    epochs: float | None = flag(None, "run length in passes over the data (default: 1)")
    tokens: int | None = flag(None, "run length in tokens: 28B, 500M", parse=tokens)
    batch: int | None = flag(None, "sequences per optimizer step, over all micro-batches (default: by model)")
    micro_batch: int | str = flag(
        AUTO,
        "sequences per forward pass; auto: the most that fit; halved when memory ends, for the same result",
        parse=number_or_auto,
    )
    checkpoint_activations: Literal["auto", "on", "off"] = flag(
        AUTO,
        "recompute activations in the backward pass: less memory, a third more work; auto: only if nothing else fits",
    )

    optimizer: Literal["adamw", "muon"] = flag(
        "adamw", "muon: for the matrices inside the blocks, with AdamW for the rest (torch 2.9 or later)"
    )
    lr: float | None = flag(None, "peak learning rate (default: by model)")
    schedule: Literal["cosine", "linear", "constant", "wsd"] = flag("cosine", "learning rate after the warm-up")
    warmup: int | None = flag(None, "warm-up steps (default: 2 percent of the run, at most 2000)")
    lr_floor: float = flag(0.1, "final learning rate as a share of the peak")
    decay_fraction: float = flag(0.2, "share of the run in which wsd decays")
    weight_decay: float = flag(0.1, "weight decay, on matrices only")
    beta1: float = flag(0.9, "AdamW beta1")
    beta2: float = flag(0.95, "AdamW beta2")
    clip: float = flag(1.0, "largest gradient norm; 0: no clipping")
    seed: int = flag(1, "seed of initial weights, data order and dropout")

    device: str = flag("auto", "cuda, mps, cpu, or auto: the best there is")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = flag(
        "auto", "auto: bf16 where the GPU has it, fp16 on older GPUs, fp32 elsewhere"
    )
    shard: Literal["auto", "on", "off"] = flag(
        AUTO,
        "under torchrun: spread weights, gradients and moments over the GPUs; auto: where one GPU cannot hold them",
    )
    compile: Literal["auto", "on", "off"] = flag("auto", "torch.compile; auto: on CUDA GPUs")
    compile_cache: Literal["on", "off"] = flag("on", "keep what torch.compile made with the run, for the next start")
    loading: Literal["auto", "preload", "memmap"] = flag(
        "auto", "token shards in memory or memory-mapped; auto: by free memory"
    )
    cache: str = flag("", "folder for unpacked copies of compressed or remote shards (default: ~/.cache/perennial)")
    cache_limit: int | None = flag(
        None, "most bytes of shards kept there: 20GB; what is needed latest goes (default: all)"
    )

    log_every: int = flag(10, "steps between log lines")
    eval_every: int = flag(250, "steps between validation losses; 0: only at the end")
    eval_tokens: int = flag(131072, "tokens per validation, always the same ones")
    sample_every: int = flag(1000, "steps between samples; 0: never")
    prompts: tuple[str, ...] = flag(
        ("What is the capital of France?", "Hello! How are you?"), "fixed prompts of the samples"
    )
    save_every: int | str = flag(
        0,
        "steps between checkpoints; 0: by time only; auto: as often as pays, from what a save costs and --preemption-minutes",
        parse=number_or_auto,
    )
    save_every_minutes: float = flag(5.0, "minutes between checkpoints; 0: by steps only")
    preemption_minutes: float = flag(60.0, "mean time between preemptions, for --save-every auto")
    max_unsaved_minutes: float = flag(60.0, "stop when no checkpoint could be stored for so long; 0: never stop for it")
    max_skipped: int = flag(
        20, "steps in a row left out for a loss or gradient that is not a number, before training stops"
    )
    grace_seconds: float = flag(
        30.0, "from a stop signal to the kill: 8 for docker stop, 4 for RunPod, 30 for GCE Spot and Kubernetes"
    )
    stop_after: float | None = flag(
        None,
        "save and stop that long after the process began, before a known limit: 90s, 30m, 11.5h, 2d",
        parse=seconds,
    )
    display: Literal["auto", "lines"] = flag("auto", "auto: drawn in place on a terminal, plain lines elsewhere")
    log_to: tuple[str, ...] = flag((), "log there too: tensorboard wandb trackio, or none", parse=logger)
    keep: int = flag(2, "newest checkpoints to keep; the best by validation loss is kept too")

    @property
    def cache_folder(self) -> Path | None:
        """The cache asked for, or None for this machine's usual one."""
        return Path(self.cache).expanduser() if self.cache else None


RUN_LENGTH = ("steps", "epochs", "tokens")
# what depends on the machine, or on where things lie, is not remembered: an A100's micro-batch would not fit a T4
FORGOTTEN = (
    "data",
    "replay",
    "out",
    "resume",
    "dry_run",
    "preflight",
    "price_per_hour",
    "display",
    "micro_batch",
    "checkpoint_activations",
    "shard",
    "device",
    "precision",
    "compile",
    "compile_cache",
    "loading",
    "cache",
    "grace_seconds",
    "stop_after",
    "cache_limit",
)
LOGGING = (
    "log_every",
    "eval_every",
    "eval_tokens",
    "sample_every",
    "prompts",
    "save_every",
    "save_every_minutes",
    "preemption_minutes",
    "max_unsaved_minutes",
    "max_skipped",
    "keep",
    "log_to",
)
FREE = frozenset({*RUN_LENGTH, *FORGOTTEN, *LOGGING})
SHAPE = ("model", "arch", "n_layer", "n_head", "n_embd", "n_ff", "block_size", "bias", "qkv_bias", "tied")
TUNING_BATCH = 64  # a chat dataset is small: larger steps would be few

# model -> (sequences per step, peak learning rate). The two GPT-2 sizes have the learning rates of GPT-3's table 2.1 (Brown
# et al. 2020) at half its batch tokens. The others are starting points: only `small` was tried on real dialogue.
RECIPES = {
    "tiny": (32, 3e-3), "small": (32, 1.5e-3), "medium": (64, 1e-3), "large": (128, 1e-3), "xlarge": (256, 6e-4),
    "gpt2_small": (512, 6e-4), "gpt2_medium": (512, 3e-4),
}  # fmt: skip


def check(config: TrainConfig) -> None:
    """Refuse values that cannot be meant. Raises UserError."""
    if sum(getattr(config, name) is not None for name in RUN_LENGTH) > 1:
        raise UserError("give only one of --steps, --epochs and --tokens")
    if config.epochs == 0:
        raise UserError("--epochs 0: expected more than 0")
    at_least = {"steps": 1, "epochs": 0, "tokens": 1, "batch": 1, "micro_batch": 1, "warmup": 0, "lr": 0, "clip": 0,
                "weight_decay": 0, "log_every": 1, "eval_every": 0, "eval_tokens": 1, "sample_every": 0,
                "save_every": 0, "save_every_minutes": 0, "preemption_minutes": 0, "max_unsaved_minutes": 0,
                "max_skipped": 1, "grace_seconds": 0, "keep": 1, "block_size": 1, "cache_limit": 1,
                "lora_rank": 0, "lora_alpha": 0}  # fmt: skip
    for name, least in at_least.items():
        value = getattr(config, name)
        if value is not None and value != AUTO and not value >= least:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    for name in ("lr_floor", "decay_fraction", "beta1", "beta2"):
        value = getattr(config, name)
        if not 0 <= value <= 1 or (value == 1 and name.startswith("beta")):
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 0 to 1")
    if config.stride is not None and not 1 <= config.stride <= config.block_size:
        raise UserError(f"--stride {config.stride}: expected 1 to the block size, {config.block_size}")
    if not 0 <= config.replay_share < 1:
        raise UserError(f"--replay-share {config.replay_share}: expected 0 up to, but not including, 1")
    if config.init_from != fs.redact(config.init_from):
        raise UserError("--init-from: give the secret of a URL by the environment, the run would remember it")
    if not 0 <= config.seed < 2**60:
        raise UserError(f"--seed {config.seed}: expected 0 to 2**60")


def check_tuning(config: TrainConfig) -> None:
    """Refuse settings that do not go together; on resume some of them come from the checkpoint. Raises UserError."""
    if bool(config.replay) != (config.replay_share > 0):
        raise UserError("--replay DIR and --replay-share, such as 0.1, go together: give both, or none")
    if config.lora_rank and not config.init_from:
        raise UserError("--lora-rank tunes what is there already: name it with --init-from")
    if config.lora_rank and config.optimizer != "adamw":
        raise UserError(f"--lora-rank with --optimizer {config.optimizer}: adapters are for adamw")


def with_places(config: TrainConfig) -> TrainConfig:
    """`data` and `out` filled in, so that the bare command works in a Colab cell and in a clone."""
    mine = drive.MOUNT / "MyDrive"
    base = mine / "perennial" if on_colab() and mine.is_dir() else Path()
    return dataclasses.replace(config, data=config.data or str(base / "data"), out=config.out or str(base / "out"))


def on_colab() -> bool:
    """True in a Colab runtime."""
    return bool(os.environ.get("COLAB_RELEASE_TAG"))


def dies_with_the_machine(out: str) -> bool:
    """True for a local folder of a Colab runtime that is not on the Drive."""
    return on_colab() and fs.is_local(out) and not drive.holds(fs.local_path(out))


def with_recipe(config: TrainConfig, device_type: str) -> TrainConfig:
    """Model, batch and learning rate chosen where they were left open."""
    model = config.model if config.model != "auto" else "gpt2_small" if device_type == "cuda" else "small"
    batch, lr = RECIPES.get(model, (32, 1e-3))
    if config.init_from:
        # a tenth keeps what was learnt; adapters want ten times more than all weights (Schulman et al., "LoRA Without
        # Regret", 2025)
        batch, lr = min(batch, TUNING_BATCH), lr if config.lora_rank else lr / 10
    return dataclasses.replace(
        config,
        model=model,
        batch=config.batch if config.batch is not None else batch,
        lr=config.lr if config.lr is not None else lr,
    )


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The model's shape. Raises GPTError for an unknown preset or an impossible shape."""
    shape = {k: getattr(config, k) for k in ("n_layer", "n_head", "n_embd", "n_ff") if getattr(config, k) is not None}
    shared = {k: getattr(config, k) for k in ("arch", "block_size", "dropout", "bias", "qkv_bias", "tied")}
    return preset(config.model, vocab_size=vocab_size, **shape, **shared)


def total_steps(config: TrainConfig, windows_per_epoch: int) -> int:
    """Run length in optimizer steps."""
    if config.steps is not None:
        return config.steps
    if config.tokens is not None:
        return max(1, config.tokens // (config.batch * config.block_size))
    return max(1, round((1.0 if config.epochs is None else config.epochs) * windows_per_epoch / config.batch))


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Warm-up length: as told, else 2 % of the run, at most 2,000 steps."""
    return config.warmup if config.warmup is not None else min(2000, max(1, total // 50))


def merge_resumed(
    stored: dict[str, Any], config: TrainConfig, given: frozenset[str], *, imported: bool = False
) -> TrainConfig:
    """The checkpoint's settings with the freely changeable flags given now; imported weights bind their SHAPE alone.

    Raises UserError naming both values where a given flag contradicts the checkpoint.
    """
    values = _checked(stored)
    free = frozenset(asdict(config)) - {*SHAPE} if imported else FREE
    for name in sorted(given - free):
        if name == "model" and config.model == "auto":
            continue
        was = values.get(name)
        if getattr(config, name) != was:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: the checkpoint was trained with "
                            f"{'the default' if was is None else was}: leave the flag out to go on, or give another --out")  # fmt: skip
    if given & set(RUN_LENGTH):
        values |= dict.fromkeys(RUN_LENGTH)
    values |= {name: getattr(config, name) for name in given & free}
    values |= {name: getattr(config, name) for name in FORGOTTEN}
    return TrainConfig(**values)


def begin_with(stored: dict[str, Any], config: TrainConfig, given: frozenset[str]) -> TrainConfig:
    """The settings with the shape of the run whose weights are begun with.

    Raises UserError naming both values where a given flag contradicts it.
    """
    was = TrainConfig(**_checked(stored))
    values = {name: getattr(was, name) for name in SHAPE}
    for name in sorted(given & values.keys()):
        if getattr(config, name) != values[name]:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: the run of --init-from has "
                            f"{values[name]}: leave the flag out")  # fmt: skip
    return dataclasses.replace(config, **values)


def merge_begun(stored: dict[str, Any], config: TrainConfig, given: frozenset[str]) -> TrainConfig:
    """The settings of a run that has no checkpoint yet, with any flag given now: none contradicts."""
    values = _checked(stored)
    if given & set(RUN_LENGTH):
        values |= dict.fromkeys(RUN_LENGTH)
    return TrainConfig(**values | {name: getattr(config, name) for name in (*given, *FORGOTTEN)})


def _checked(stored: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's settings, each of its field's type: they are untrusted input. Raises DataError."""
    hints = typing.get_type_hints(TrainConfig)
    values = {}
    for name, value in stored.items():
        hint = hints.get(name, str)
        value = tuple(value) if isinstance(value, list) else value
        if typing.get_origin(hint) is typing.Literal:
            fits = value in typing.get_args(hint)
        elif typing.get_origin(hint) is tuple:
            fits = isinstance(value, tuple) and all(isinstance(v, str) for v in value)
        else:
            fits = isinstance(value, hint) or (isinstance(value, int) and isinstance(0.0, hint))
        if name not in hints or not fits:
            raise DataError(f"the checkpoint's setting {name}={value!r} is none of this program's: it was changed, or "
                            "made by another version")  # fmt: skip
        values[name] = value
    return values


def stored_form(config: TrainConfig) -> dict[str, Any]:
    """The settings as JSON-able values, for config.json and state.json."""
    return {k: v for k, v in asdict(config).items() if k not in FORGOTTEN}
