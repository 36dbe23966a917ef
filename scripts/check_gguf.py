"""Prove a run's GGUF export in llama.cpp: same ids, same greedy text as ours: `python scripts/check_gguf.py --run out`.

Needs llama-cpp-python, which pip builds from its source (some ten minutes on one core; a C++ compiler).
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import itertools
import tempfile
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from gpt.model import GPT
from gpt.sample import generate
from gpt.tokenizer import Tokenizer
from scripts.loading import load_model
from scripts.to_gguf import write_gguf

PROMPTS = (
    "What is the capital of France?", "Hello! How are you?", "Tell me a joke.", "Who are you?", "How many legs has a spider?",
    "Once upon a time", "The weather today", "I don't think 12,345 is", "What's your favorite film?", "Good morning",
)  # fmt: skip
GGML_F32 = 0  # llama.cpp keeps keys and values in f16 unless told otherwise


@dataclass(frozen=True)
class CheckFlags:
    """Flags of scripts/check_gguf.py."""

    run: str = flag("out", "run folder or URL: the --out of train/run.py", env="PERENNIAL_OUT")
    step: int | None = flag(None, "checkpoint of this step instead of the newest")
    float_type: Literal["f32", "f16"] = flag("f32", "numbers in the GGUF file")
    max_tokens: int = flag(64, "tokens of each greedy text")


def main(argv: list[str] | None = None) -> int:
    """Print one line a prompt, as chat and as plain text, with the number of tokens that are the same.

    Returns 1 where a text differs. Raises UserError where the model's block size does not hold --max-tokens of each.
    """
    args, _ = flags.parse(CheckFlags, argv, prog="check_gguf.py", description=__doc__.split("\n")[0])
    try:
        import llama_cpp
    except ImportError as e:
        raise UserError("llama-cpp-python is not installed: pip install llama-cpp-python (builds it)") from e
    model, tokenizer = load_model(args.run, device="cpu", step=args.step)
    cases = [
        (chat, prompt, prompt_ids(tokenizer, prompt, chat))
        for chat, prompt in itertools.product((True, False), PROMPTS)
    ]
    room = model.config.block_size - max(len(ids) for *_, ids in cases)
    if not 1 <= args.max_tokens <= room:
        raise UserError(f"--max-tokens {args.max_tokens}: the model's block size, {model.config.block_size}, holds at most "
                        f"{max(room, 0)} after the longest prompt: name a run with a larger one, or compare fewer")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(path, model, tokenizer, float_type=args.float_type)
        llama = llama_cpp.Llama(
            str(path), n_ctx=model.config.block_size, logits_all=True, verbose=False,
            type_k=GGML_F32, type_v=GGML_F32, flash_attn=False,
        )  # fmt: skip
        same = [compare(llama, model, tokenizer, prompt, chat, ids, args.max_tokens) for chat, prompt, ids in cases]
        print(f"logits     {logit_difference(llama, model):.1e} apart at most, of {args.float_type}")
    print(
        f"same text  {sum(same)} of {len(same)}, {args.max_tokens} tokens each, llama-cpp-python {llama_cpp.__version__}"
    )
    return 0 if all(same) else 1


def prompt_ids(tokenizer: Tokenizer, prompt: str, chat: bool) -> list[int]:
    """Ours, of a question in a conversation or of a plain text."""
    return (
        tokenizer.render([("user", prompt)], reply=True) if chat else [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    )


def compare(
    llama: Any, model: GPT, tokenizer: Tokenizer, prompt: str, chat: bool, ids: list[int], max_tokens: int
) -> bool:  # fmt: skip
    """Whether both go on alike for `max_tokens`, from ids that each made of the text by itself."""
    text = f"<|user|>{prompt}<|end|><|assistant|>" if chat else prompt
    theirs = llama.tokenize(text.encode(), add_bos=True, special=True)
    ours = generate(model, [ids], max_tokens=max_tokens, temperature=0.0)[0]
    llama.reset()
    said = list(itertools.islice(llama.generate(theirs, temp=0.0, top_k=1, repeat_penalty=1.0), max_tokens))
    same = theirs == ids and said == ours and len(ours) == max_tokens
    verdict = f"same {len(ours)}" if same else "DIFFERENT"
    print(f"{verdict:<10} {prompt} -> {' '.join(tokenizer.decode(ours).split())[:60]}")
    return same


@torch.no_grad()
def logit_difference(llama: Any, model: GPT) -> float:
    """The largest difference over the logits of 32 random ids."""
    ids = torch.randint(model.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(1))
    llama.reset()
    llama.eval(ids[0].tolist())
    return float(np.abs(llama.scores[:32] - model(ids)[0].numpy()).max())


if __name__ == "__main__":
    flags.run(main)
