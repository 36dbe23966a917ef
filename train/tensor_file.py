"""Write a safetensors file as a stream: `safetensors.save_file` first makes a second copy of every tensor in memory."""

import json
from typing import Protocol

import torch
from torch import Tensor

# the names of https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
CHUNK_BYTES = 1 << 20  # hashed, then copied, while it is in the cache of a core


class Sink(Protocol):
    """Whatever takes bytes."""

    def write(self, data: memoryview | bytes) -> object:
        """Take all of `data`."""


def write_tensors(sink: Sink, tensors: dict[str, Tensor]) -> None:
    """Write named contiguous CPU tensors. Memory: none but a view of 1 MiB at a time."""
    # widest first: every tensor then begins at a multiple of its item size, as readers that map the file want
    names = sorted(tensors, key=lambda n: (-tensors[n].itemsize, n))
    header, at = {}, 0
    for name in names:
        t = tensors[name]
        header[name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        raw = memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())
        for start in range(0, len(raw), CHUNK_BYTES):
            sink.write(raw[start : start + CHUNK_BYTES])
