"""The peers of the benchmarks: a GPT and its training step as textbooks have them, in nanoGPT's way.

What github.com/karpathy/nanoGPT does in model.py and train.py (fused attention, autocast, gradient clipping, AdamW
with decay on matrices, whole-batch logits into F.cross_entropy, torch.compile of the model), and nothing of ours.
"""

import contextlib

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TextbookBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(self.ln_1(x)).split(C, dim=2)
        q, k, v = (t.view(B, T, self.heads, C // self.heads).transpose(1, 2) for t in (q, k, v))  # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh"))


class TextbookGPT(nn.Module):
    """GPT-2 with a head of its own, so that it has as many parameters as ours."""

    def __init__(self, *, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList(TextbookBlock(n_embd, n_head) for _ in range(n_layer))
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                scale = (2 * n_layer) ** -0.5 if name.endswith(("c_proj.weight", "c_out.weight")) else 1.0
                nn.init.normal_(p, std=0.02 * scale)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of (B, T) ids."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1))


class TextbookTrainer:
    """nanoGPT's loop around it; `step` is one optimizer step on fresh random windows of a memory-mapped file of ids."""

    def __init__(
        self, model: nn.Module, ids: np.memmap, *, batch: int, micro_batch: int, lr: float, device: str,
        dtype: torch.dtype, compiled: bool,
    ) -> None:  # fmt: skip
        self.ids, self.batch, self.micro_batch, self.device = ids, batch, micro_batch, device
        self.model, self.block_size = model.to(device), model.wpe.num_embeddings
        self.forward = torch.compile(self.model) if compiled else self.model
        decayed = [p for p in self.model.parameters() if p.dim() >= 2]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        fused = device.startswith("cuda")  # nanoGPT's rule
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)
        self.scaler = torch.amp.GradScaler(device.split(":")[0], enabled=dtype == torch.float16)
        wide = dtype == torch.float32
        self.autocast = contextlib.nullcontext() if wide else torch.autocast(device.split(":")[0], dtype)
        if fused:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.next = self.get_batch()

    def get_batch(self) -> tuple[Tensor, Tensor]:
        """Random windows: (micro_batch, block_size) inputs and targets on the device."""
        T = self.block_size
        ix = torch.randint(len(self.ids) - T, (self.micro_batch,))
        x = torch.stack([torch.from_numpy(self.ids[i : i + T].astype(np.int64)) for i in ix])
        y = torch.stack([torch.from_numpy(self.ids[i + 1 : i + 1 + T].astype(np.int64)) for i in ix])
        if self.device.startswith("cuda"):
            pinned = x.pin_memory(), y.pin_memory()
            return tuple(t.to(self.device, non_blocking=True) for t in pinned)
        return x.to(self.device), y.to(self.device)

    def step(self) -> Tensor:
        """The last micro-batch's loss, on the device."""
        accumulate = self.batch // self.micro_batch
        for _ in range(accumulate):
            with self.autocast:
                loss = self.forward(*self.next) / accumulate
            self.next = self.get_batch()  # while the device is busy with the forward pass
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach() * accumulate
