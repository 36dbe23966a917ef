"""What the machine can do: device, number format, compilation, peak speed."""

import contextlib
import importlib.util
import os
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from cli import memory
from cli.errors import UserError
from gpt.model import GPTConfig

# dense bf16/fp16 tensor-core peaks in FLOP/s, from the vendors' data sheets, by a part of the device name
PEAK_FLOPS = {
    "H200": 989e12, "H100": 989e12, "GH200": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10G": 125e12,
    "A10": 125e12, "V100": 125e12, "T4": 65e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "RTX 6000 Ada": 364e12,
}  # fmt: skip


@dataclass(frozen=True)
class Machine:
    """A device and the number format to compute in there."""

    device: torch.device
    dtype: torch.dtype
    compile: bool

    @property
    def name(self) -> str:
        """A human name: the GPU's, or "cpu"."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def precision(self) -> str:
        """bf16, fp16 or fp32."""
        return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[self.dtype]

    def autocast(self) -> AbstractContextManager:
        """The context in which forward passes run: matmuls in `dtype`, weights and sums in fp32."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """A loss scaler that does something only for fp16, whose gradients would underflow."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def peak_flops(self) -> float | None:
        """The device's peak in FLOP/s in 16-bit formats; None where it is not known (then there is no MFU)."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return None
        return next((peak for part, peak in PEAK_FLOPS.items() if part in self.name), None)

    def memory_bytes(self) -> int:
        """The GPU's memory; 0 off CUDA."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else 0

    def peak_memory_bytes(self) -> int | None:
        """Most GPU memory held at once since the start, or forget_peak_memory; None off CUDA."""
        return torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None

    def free_cached_memory(self) -> None:
        """Give what torch keeps for later back to the device."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def forget_peak_memory(self) -> None:
        """Count `peak_memory_bytes` from now on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def rng_tensors(self) -> dict[str, Tensor]:
        """The random state that dropout draws from: the CPU's and the device's."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            state["mps"] = torch.mps.get_rng_state()
        return state

    def set_rng_tensors(self, state: dict[str, Tensor]) -> None:
        """Put a random state back; that of another kind of device is left out."""
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)
        elif self.device.type == "mps" and "mps" in state:
            torch.mps.set_rng_state(state["mps"])

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it, so that a clock can be read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def choose_machine(device: str, precision: str, compile: str) -> Machine:
    """The Machine that three flags mean here. Raises UserError for a device or format this machine lacks."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {device}: expected auto, cuda, cuda:1, mps or cpu")
    kind = chosen.type
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; choose a GPU runtime, or --device cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch sees no Apple GPU here; use --device cpu")
    if kind == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    capability = torch.cuda.get_device_capability(chosen) if kind == "cuda" else (0, 0)
    if precision == "auto":
        precision = ("bf16" if capability >= (8, 0) else "fp16") if kind == "cuda" else "fp32"
    if precision == "bf16" and kind == "cuda" and capability < (8, 0):
        raise UserError(f"--precision bf16: {torch.cuda.get_device_name()} has none; use fp16 or leave it to auto")
    if precision == "fp16" and kind == "cpu":
        raise UserError("--precision fp16: a CPU has no fast fp16; use bf16, fp32 or leave it to auto")
    if compile == "on" and kind == "cpu" and torch.__version__.startswith("2.6."):
        raise UserError("--compile on: torch 2.6 compiles wrong gradients of embeddings on a CPU (measured; 2.13 is right): "
                        "use a newer torch, or leave it to auto")  # fmt: skip
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32 on Ampere and later
    can_compile = (
        kind == "cuda"
        and capability >= (7, 0)
        and importlib.util.find_spec("triton") is not None
        and any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang"))
    )
    if compile == "auto" and can_compile:
        torch._dynamo.config.suppress_errors = True  # what cannot be compiled here runs as it is
    return Machine(chosen, dtype, compile == "on" or (compile == "auto" and can_compile))


def keep_freed_memory(machine: Machine) -> None:
    """Where a CPU trains, have glibc keep what is freed for the next step: giving it back is 4 % of a `small` step."""
    if machine.device.type == "cpu":
        memory.keep_freed_memory()


def attention_kernel(shape: GPTConfig, machine: Machine) -> str:
    """Which of its attention kernels torch takes for training this shape here: flash, efficient, cudnn or math.

    It is the best that the device has: GPUs before Ampere (a T4) have no flash attention.
    """
    heads = (1, shape.block_size, shape.n_head, shape.head_width)
    q = torch.empty(heads, dtype=machine.dtype, device=machine.device, requires_grad=True).transpose(1, 2)
    chosen = torch._fused_sdp_choice(q, q, q, None, shape.dropout, True)
    return SDPBackend(chosen).name.split("_")[0].lower()
