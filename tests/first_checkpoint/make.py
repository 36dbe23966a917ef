"""How this folder was made, by the program of commit 47d6737: the dataset, the run killed after step 2, and its losses.

git worktree add /tmp/first 47d6737 && python tests/first_checkpoint/make.py /tmp/first
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ("--data", "data", "--model", "tiny", "--n-layer", "1", "--n-head", "1", "--n-embd", "4", "--tied", "--block-size",
         "16", "--batch", "4", "--lr", "0.02", "--warmup", "2", "--dropout", "0.1", "--device", "cpu", "--eval-every", "0",
         "--eval-tokens", "64", "--sample-every", "0", "--resume")  # fmt: skip


def main(program: Path) -> None:
    """Run the old program's two entry points in this folder."""

    def run(script: str, *flags: str) -> None:
        subprocess.run([sys.executable, program / script, *flags], cwd=HERE, check=True, env={"OMP_NUM_THREADS": "1"})

    names, things = ("Ann", "Bob", "Cy", "Dee"), ("apples", "pears", "plums")
    texts = (f"{names[i % 4]} has {i * 7 % 90} {things[i % 3]}, {names[i * i % 4]} has none." for i in range(60))
    (HERE / "corpus.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    run(
        "prep/tokenize_bpe.py",
        "--input",
        "corpus.jsonl",
        "--output",
        "data",
        "--vocab-size",
        "270",
        "--val-fraction",
        "0.1",
    )
    run("train/run.py", *FLAGS, "--out", "whole", "--steps", "8")
    metrics = [json.loads(line) for line in (HERE / "whole" / "metrics.jsonl").read_text().splitlines()]
    (HERE / "losses.json").write_text(json.dumps([m["loss"] for m in metrics if "loss" in m]) + "\n")
    run("train/run.py", *FLAGS, "--out", "out", "--steps", "8", "--save-every", "2", "--keep", "9")
    for path in (*(HERE / "out").glob("step-*"), HERE / "whole", HERE / "corpus.jsonl"):
        if path.name != "step-00000002":
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    for name in ("data/report.html", "data/report.json", "data/timing.js", "out/.lock"):
        (HERE / name).unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
