"""Prove our HellaSwag score against lm-evaluation-harness, which reads the run's transformers export, offline.

python scripts/check_hellaswag.py --run out --hellaswag hellaswag_val.jsonl --items 200
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import os
import tempfile
from dataclasses import dataclass
from typing import Any

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from scripts import hellaswag
from scripts.export import write_hf
from scripts.loading import load_model


@dataclass(frozen=True)
class CheckFlags:
    """Flags of scripts/check_hellaswag.py."""

    run: str = flag("out", "run folder or URL: the --out of train/run.py", env="PERENNIAL_OUT")
    step: int | None = flag(None, "checkpoint of this step instead of the newest")
    hellaswag: str = flag("", "a .jsonl file with ctx, endings and label, or the word download")
    items: int = flag(200, "its first items")


def main(argv: list[str] | None = None) -> int:
    """Print both scores. Returns 1 where they differ, or where any ending's log-likelihood does by 0.01 or more."""
    args, _ = flags.parse(CheckFlags, argv, prog="check_hellaswag.py", description=__doc__.split("\n")[0])
    if not args.hellaswag:
        raise UserError("--hellaswag is needed: a .jsonl file with ctx, endings and label, or the word download")
    path = hellaswag.download() if args.hellaswag == "download" else Path(args.hellaswag).expanduser()
    items = hellaswag.read_items(path, args.items)
    model, tokenizer = load_model(args.run, device="cpu", step=args.step)
    chosen = list(hellaswag.choices(model, tokenizer, items))
    ours = hellaswag.accuracies(items, chosen)
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "hf"
        exported.mkdir()
        write_hf(exported, model, tokenizer)
        theirs, likelihoods = harness(exported, items, Path(folder))
    apart = max(
        abs(-a - b) for c, row in zip(chosen, likelihoods, strict=True) for a, b in zip(c.nats, row, strict=True)
    )
    print(f"{'':<8}  acc     acc_norm per character")
    print(f"{'ours':<8}  {ours['acc']:.4f}  {ours['acc_norm_lm_eval']:.4f}")
    print(f"{'lm-eval':<8}  {theirs['acc,none']:.4f}  {theirs['acc_norm,none']:.4f}")
    print(f"{len(items)} items; log-likelihoods at most {apart:.1e} apart")
    same = (ours["acc"], ours["acc_norm_lm_eval"]) == (theirs["acc,none"], theirs["acc_norm,none"])
    return 0 if same and apart < 0.01 else 1


def harness(exported: Path, items: list[hellaswag.Item], work: Path) -> tuple[dict[str, Any], list[list[float]]]:
    """(lm-eval's figures, the log-likelihoods it found for each item) of a transformers folder. Touches no network."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(work / "cache"), "TOKENIZERS_PARALLELISM": "false"}
    try:
        import lm_eval
    except ImportError as e:
        raise UserError("lm-eval is not installed: pip install lm-eval") from e
    file = work / "items.jsonl"
    rows = [{"ctx": item.context, "endings": item.endings, "label": item.label} for item in items]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = {
        "task": "hellaswag_here",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(file)}},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{ctx}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "endings",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    found = lm_eval.simple_evaluate(
        model="hf", model_args={"pretrained": str(exported), "dtype": "float32", "device": "cpu"}, tasks=[task],
        batch_size=8, bootstrap_iters=0, log_samples=True,
    )  # fmt: skip
    samples = sorted(found["samples"]["hellaswag_here"], key=lambda s: s["doc_id"])
    likelihoods = [[float(r[0]) for r in s["filtered_resps"]] for s in samples]
    return found["results"]["hellaswag_here"], likelihoods


if __name__ == "__main__":
    flags.run(main)
