"""Take a trained model elsewhere, or bring one here.

    python scripts/export.py --run out --to hf --output my-model
    python scripts/export.py --run out --to gguf --output my-gguf
    python scripts/export.py --from hf gpt2-folder --out run

hf     a folder that transformers loads offline: weights, tokenizer with chat template, generation settings, a model card
gguf   one file that llama.cpp runs, with a Modelfile for Ollama
torch  the same weights under our own names, one model.safetensors with model.json, to be read by gpt.model.GPT
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from cli.progress import count
from gpt import hf
from gpt.model import GPT
from gpt.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, END_OF_TURN, Tokenizer
from scripts.import_hf import import_run
from scripts.loading import load_model, load_record
from scripts.model_card import read_card
from scripts.to_gguf import differs, modelfile, write_gguf
from store import fs
from store.errors import StoreError

NEXT = {
    "hf": "python -c \"from transformers import pipeline; print(pipeline('text-generation', '{}')"
    "([{{'role': 'user', 'content': 'Hello!'}}]))\"",
    "gguf": "ollama create my-model -f {}/Modelfile && ollama run my-model",
}


@dataclass(frozen=True)
class ExportFlags:
    """Flags of scripts/export.py."""

    run: str = flag("out", "run folder or URL: the --out of train/run.py", env="PERENNIAL_OUT")
    to: Literal["hf", "gguf", "torch"] = flag(
        "hf", "hf: for transformers and all that reads its folders; gguf: for llama.cpp and Ollama; torch: for this project's code"
    )  # fmt: skip
    output: str = flag("", "new folder (default: exported-hf, exported-gguf or exported-torch)")
    step: int | None = flag(None, "checkpoint of this step instead of the newest")
    float_type: Literal["f32", "f16"] = flag("f16", "numbers in a GGUF file: f32 is exact, f16 half as large")
    data: str = flag("", "the token dataset of the run, for the model card")
    price_per_hour: float | None = flag(None, "what the machine cost, for the model card", parse=flags.price)
    from_: tuple[str, ...] = flag((), "hf FOLDER: the other way round, a GPT2LMHeadModel folder into a new run, --out")
    out: str = flag("", "with --from: the run to make, the --out with which train/run.py goes on")


def main(argv: list[str] | None = None) -> int:
    """Write the folder, whole or not at all."""
    args, given = flags.parse(ExportFlags, argv, prog="export.py", description=__doc__.split("\n")[0])
    if args.from_ or args.out:
        return bring_here(args, given)
    output = Path(args.output or f"exported-{args.to}").expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: is not empty: give a new folder")
    model, tokenizer = load_model(args.run, device="cpu", step=args.step)
    record = load_record(args.run, step=args.step)
    card = read_card(args.run, model, record, data=args.data, price_per_hour=args.price_per_hour)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
            made = Path(folder) / "model"
            made.mkdir()
            write(made, args, model, tokenizer, card)
            if output.exists():
                output.rmdir()
            os.replace(made, output)
    except (OSError, SafetensorError) as e:
        raise StoreError(f"--output {output}: cannot be written ({getattr(e, 'strerror', None) or e}): make room there, or name "
                         "another folder") from e  # fmt: skip
    n_bytes = sum(p.stat().st_size for p in output.iterdir())
    print(f"exported   {output} ({count(n_bytes)}B): step {record['step']}, {count(model.num_params())} parameters")
    if args.to in NEXT:
        print(f"next       {NEXT[args.to].format(output)}")
    return 0


def write(folder: Path, args: ExportFlags, model: GPT, tokenizer: Tokenizer, card: str) -> None:
    """The files of one kind of export into an empty folder."""
    if args.to == "hf":
        write_hf(folder, model, tokenizer)
        (folder / "README.md").write_text(card, "utf-8")
    elif args.to == "gguf":
        name = f"model-{args.float_type}.gguf"
        write_gguf(folder / name, model, tokenizer, float_type=args.float_type)
        if note := differs(tokenizer):
            print(f"note       {note}")
        (folder / "Modelfile").write_text(modelfile(model, name), "utf-8")
    else:
        save_file(model.state_dict(), folder / "model.safetensors")
        write_json(folder / "model.json", asdict(model.config))
        (folder / "tokenizer.json").write_text(tokenizer.json_text, "utf-8")


def bring_here(args: ExportFlags, given: frozenset[str]) -> int:
    """--from hf FOLDER --out RUN."""
    if other := given - {"from_", "out"}:
        raise UserError(
            f"--{min(other).replace('_', '-')}: has no effect on an import: --from hf FOLDER --out RUN is all"
        )
    if len(args.from_) != 2 or args.from_[0] != "hf" or not args.out:
        raise UserError("an import is given as --from hf FOLDER --out RUN, where FOLDER holds a GPT2LMHeadModel")
    notes = import_run(Path(args.from_[1]).expanduser(), args.out)
    for note in notes:
        print(f"note       {note}")
    run = fs.redact(args.out)
    print(f"imported   {run}")
    print(f'sample     python scripts/sample.py --run {run} --raw --prompt "Once upon a time"')
    print(f"train      python prep/tokenize_bpe.py --input corpus.txt --tokenizer {fs.join(run, 'tokenizer.json')} "
          f"--output tokens && python train/run.py --data tokens --out {run} --resume")  # fmt: skip
    return 0


def write_hf(folder: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """What `AutoModelForCausalLM` and `AutoTokenizer` load from a folder without a network."""
    kwargs, tensors = hf.to_hf(model)
    ids = {
        "bos_token_id": tokenizer.end_of_text,
        "eos_token_id": tokenizer.end_of_turn,
        "pad_token_id": tokenizer.end_of_text,
    }
    model_type, architecture = hf.CLASSES[model.config.arch]
    write_json(folder / "config.json", {
        "architectures": [architecture], "model_type": model_type, **kwargs, **ids, "torch_dtype": "float32",
    })  # fmt: skip
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.json").write_text(tokenizer.json_text, "utf-8")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size,
        "bos_token": END_OF_TEXT, "eos_token": END_OF_TURN, "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
    })  # fmt: skip
    write_json(folder / "generation_config.json", {
        **ids, "eos_token_id": [tokenizer.end_of_turn, tokenizer.end_of_text], "do_sample": True, "temperature": 0.8, "top_k": 50,
        "max_new_tokens": 128,
    })  # fmt: skip


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    flags.run(main)
