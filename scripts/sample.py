"""Ask a trained model: one answer per prompt.

python scripts/sample.py --run out --prompt "What is the capital of France?"
echo "Once upon a time" | python scripts/sample.py --run out --raw
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataclasses import dataclass
from typing import Literal

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from gpt.compiled import compile_decoding
from gpt.decoding import lay_out_for_decoding
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from scripts.answering import Answer
from scripts.loading import load_model


@dataclass(frozen=True)
class SampleFlags:
    """Flags of scripts/sample.py."""

    run: str = flag("out", "run folder or URL: the --out of train/run.py", env="PERENNIAL_OUT")
    prompt: tuple[str, ...] = flag((), "one or more prompts (default: each line of stdin)")
    raw: bool = flag(False, "continue the prompt as plain text instead of answering it as a chat message")
    max_tokens: int = flag(128, "longest answer")
    temperature: float = flag(0.8, "randomness; 0: always the likeliest token")
    top_k: int | None = flag(50, "choose among this many likeliest tokens")
    top_p: float | None = flag(None, "choose among the likeliest tokens of this much probability together")
    repetition_penalty: float = flag(1.0, "above 1: tokens that occurred become less likely")
    seed: int | None = flag(None, "seed, for the same answer every time")
    step: int | None = flag(None, "checkpoint of this step instead of the newest")
    device: str = flag("auto", "cuda, mps, cpu, or auto")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = flag(
        "auto", "format of the weights; auto: bf16 where the GPU has it, fp16 on older GPUs, fp32 elsewhere"
    )
    compile: bool = flag(
        False, "decode by one compiled graph, on a GPU a CUDA graph: its first token takes up to a minute"
    )


def main(argv: list[str] | None = None) -> int:
    """Answer every prompt, streaming. With several, each answer follows its prompt."""
    args, _ = flags.parse(SampleFlags, argv, prog="sample.py", description=__doc__.split("\n")[0])
    prompts = list(args.prompt) or read_prompts()
    model, tokenizer = load_model(args.run, device=args.device, step=args.step, precision=args.precision)
    lay_out_for_decoding(model)
    if args.compile:
        compile_decoding(model)
    for prompt in prompts:
        if len(prompts) > 1:
            print(f"> {prompt}")
        elif args.raw:
            print(prompt, end="")
        ids = (
            [tokenizer.end_of_text, *tokenizer.encode(prompt)]
            if args.raw
            else tokenizer.render([("user", prompt)], reply=True)
        )
        for piece in answer(model, tokenizer, ids, args):
            print(piece, end="", flush=True)
        print()
    return 0


def read_prompts() -> list[str]:
    """The lines of stdin. Raises UserError when there are none, or a person sits there waiting."""
    lines = [] if sys.stdin.isatty() else [line.strip() for line in sys.stdin if line.strip()]
    if not lines:
        raise UserError('no prompt: give --prompt "…", or text on stdin; scripts/chat.py is for talking')
    return lines


def answer(model: GPT, tokenizer: Tokenizer, ids: list[int], args: "SampleFlags", *, most: int | None = None) -> Answer:
    """The text that follows `ids`, to be iterated over: `most` tokens of it where that is less than --max-tokens.

    Raises GPTError for settings that make no sense.
    """
    return Answer(
        model, tokenizer, ids,
        max_tokens=args.max_tokens if most is None else min(args.max_tokens, most), temperature=args.temperature,
        top_k=args.top_k, top_p=args.top_p, repetition_penalty=args.repetition_penalty, seed=args.seed,
    )  # fmt: skip


if __name__ == "__main__":
    flags.run(main)
