"""Take a trained model elsewhere: `python scripts/export.py --run out --to hf --output my-model`.

hf     a folder that transformers loads offline: weights, tokenizer with chat template, generation settings, a model card
torch  the same weights under our own names, one model.safetensors with model.json, to be read by gpt.model.GPT
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass
from typing import Any, Literal

from safetensors.torch import save_file

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from cli.progress import count, duration
from gpt import hf
from gpt.model import GPT
from gpt.tokenizer import END_OF_TEXT, END_OF_TURN, ROLE_TOKENS, Tokenizer
from scripts.loading import load_model, load_record
from scripts.plot import read_log
from store import fs

# what Tokenizer.render does, in the templates' language; roles other than these three are refused, as there
CHAT_TEMPLATE = (
    "{{ 'BEGIN' }}{% for m in messages %}"
    "{% if m['role'] not in ROLES %}{{ raise_exception('unknown role ' + m['role']) }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + 'END' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'REPLY' }}{% endif %}"
)
for _name, _value in (
    ("BEGIN", END_OF_TEXT),
    ("ROLES", str(list(ROLE_TOKENS))),
    ("END", END_OF_TURN),
    ("REPLY", ROLE_TOKENS["assistant"]),
):
    CHAT_TEMPLATE = CHAT_TEMPLATE.replace(_name, _value)


@dataclass(frozen=True)
class ExportFlags:
    """Flags of scripts/export.py."""

    run: str = flag("out", "run folder or URL: the --out of train/run.py", env="PERENNIAL_OUT")
    to: Literal["hf", "torch"] = flag(
        "hf", "hf: for transformers and all that reads its folders; torch: for this project's code"
    )
    output: str = flag("", "new folder (default: exported-hf or exported-torch)")
    step: int | None = flag(None, "checkpoint of this step instead of the newest")


def main(argv: list[str] | None = None) -> int:
    """Write the folder, whole or not at all."""
    args, _ = flags.parse(ExportFlags, argv, prog="export.py", description=__doc__.split("\n")[0])
    output = Path(args.output or f"exported-{args.to}").expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: is not empty: give a new folder")
    model, tokenizer = load_model(args.run, device="cpu", step=args.step)
    record = load_record(args.run, step=args.step)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        made = Path(folder) / "model"
        made.mkdir()
        if args.to == "hf":
            write_hf(made, model, tokenizer, record, args.run)
        else:
            save_file(model.state_dict(), made / "model.safetensors")
            write_json(made / "model.json", asdict(model.config))
            (made / "tokenizer.json").write_text(tokenizer.json_text, "utf-8")
        if output.exists():
            output.rmdir()
        os.replace(made, output)
    n_bytes = sum(p.stat().st_size for p in output.iterdir())
    print(
        f"exported   {output} ({count(n_bytes)}B): step {record['step']}, {count(sum(p.numel() for p in model.parameters()))} parameters"
    )
    if args.to == "hf":
        print(f"next       python -c \"from transformers import pipeline; print(pipeline('text-generation', '{output}')"
              "([{'role': 'user', 'content': 'Hello!'}]))\"")  # fmt: skip
    return 0


def write_hf(folder: Path, model: GPT, tokenizer: Tokenizer, record: dict[str, Any], run: str) -> None:
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
    (folder / "README.md").write_text(model_card(model, record, run), "utf-8")


def model_card(model: GPT, record: dict[str, Any], run: str) -> str:
    """A model card filled from the run's own records; what they do not tell is left for the owner to write."""
    config, c = record["config"], model.config
    metrics, samples = read_log(run, "metrics.jsonl"), latest_samples(run)
    losses = {m["step"]: m["loss"] for m in metrics if m.get("loss") is not None and m["step"] <= record["step"]}
    vals = [
        (m["step"], m["val_loss"]) for m in metrics if m.get("val_loss") is not None and m["step"] <= record["step"]
    ]
    rows = [
        ("parameters", f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"),
        ("shape", f"GPT-2: {c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.block_size}, vocabulary {c.vocab_size}"),
        ("trained", f"{record['step']:,} steps of {config['batch']} x {config['block_size']} = {count(record['tokens'])} tokens "
                    f"in {duration(record['elapsed_s'])}"),
        ("optimizer", f"AdamW, peak learning rate {config['lr']:g}, {config['schedule']}, weight decay {config['weight_decay']:g}"),
    ]  # fmt: skip
    if losses:
        tail = [losses[s] for s in sorted(losses)[-100:]]
        rows.append(("training loss", f"{sum(tail) / len(tail):.3f} (mean of the last {len(tail)} steps)"))
    if vals:
        rows.append(("validation loss", f"{vals[-1][1]:.4f}, perplexity {math.exp(min(vals[-1][1], 50)):.1f}"))
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    curve = "\n".join(f"| {step:,} | {loss:.4f} |" for step, loss in thinned(vals, 12))
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n# license: name one before you publish\n---\n",
        "# A GPT-2 model trained from scratch with Perennial\n",
        f"| | |\n|---|---|\n{table}\n",
        f"## Validation loss\n\n| step | loss |\n|---|---|\n{curve}\n" if curve else "",
        f"## What it says\n\n```\n{samples.strip()}\n```\n" if samples else "",
        "## Data\n\nSay what it was trained on, how that was cleaned, and under which licence it may be used. The dataset's "
        f"fingerprint is `{record['data']['fingerprint'][:16]}`.\n",
        "## Use\n\n```python\nfrom transformers import pipeline\n\nchat = pipeline(\"text-generation\", \"path/to/this/folder\")\n"
        'print(chat([{"role": "user", "content": "Hello!"}]))\n```\n',
    ]  # fmt: skip
    return "\n".join(p for p in parts if p)


def thinned(rows: list[Any], n: int) -> list[Any]:
    """At most n of the rows, evenly, the last one among them."""
    return [rows[round(i * (len(rows) - 1) / max(min(n, len(rows)) - 1, 1))] for i in range(min(n, len(rows)))]


def latest_samples(run: str) -> str:
    """The newest samples that training wrote; empty when there are none."""
    names = [e.name for e in fs.list_folder(fs.join(run, "samples")) if e.name.endswith(".txt")]
    return fs.read_text(fs.join(run, "samples", names[-1])) if names else ""


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    flags.run(main)
