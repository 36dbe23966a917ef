"""The whole road in some minutes: corpus -> tokenizer -> shards -> training, killed and resumed -> a model that answers.

bash scripts/quickstart.sh          # installs first; this file alone expects the packages to be there
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass

from cli import flags
from cli.errors import UserError
from cli.flags import flag
from cli.progress import duration
from gpt.sample import generate
from scripts import demo_corpus
from scripts.loading import load_model
from train import checkpoint
from train.folder import read_lines

ROOT = Path(__file__).resolve().parent.parent
PREP = ["--vocab-size", "1024", "--compress"]
# two layers learn the demo's 300 facts in about 600 such steps, over all seeds tried; the rest is margin
TRAIN = ["--model", "tiny", "--block-size", "128", "--batch", "16", "--lr", "5e-3", "--warmup", "40", "--lr-floor", "0.05",
         "--steps", "800", "--log-every", "50", "--eval-every", "200", "--eval-tokens", "16384", "--sample-every", "400",
         "--save-every", "100", "--save-every-minutes", "0"]  # fmt: skip
KILL_AFTER = 450  # steps: between two checkpoints, so that some work is lost and done again


@dataclass(frozen=True)
class QuickstartFlags:
    """Flags of scripts/quickstart.py."""

    folder: str = flag("demo", "where corpus, dataset and run are kept")
    fresh: bool = flag(False, "delete them and begin again")


def main(argv: list[str] | None = None) -> int:
    """Run the road. Returns 0 when at least four of five answers are right."""
    args, _ = flags.parse(QuickstartFlags, argv, prog="quickstart.py", description=__doc__.split("\n")[0])
    start_s = time.monotonic()
    folder = Path(args.folder).expanduser().resolve()
    if args.fresh and (folder / "corpus.txt").exists():
        shutil.rmtree(folder)
    corpus, tokens, run = folder / "corpus.txt", folder / "tokens", folder / "run"

    title("1. A corpus of small conversations")
    if not corpus.exists():
        folder.mkdir(parents=True, exist_ok=True)
        python("scripts/demo_corpus.py", "--output", corpus)
    print("\n".join(corpus.read_text("utf-8").split("\n")[:6]))

    title("2. A tokenizer, and compressed token shards")
    python("prep/tokenize_bpe.py", "--input", corpus, "--output", tokens, *PREP, "--resume")

    train = ["train/run.py", "--data", str(tokens), "--out", str(run), *TRAIN, "--resume"]
    if not finished(run):
        if not (run / "events.jsonl").exists():
            title(f"3. Training, until kill -9 after step {KILL_AFTER}")
            train_and_kill(train, run)
        title("4. The same command again")
    python(*train)

    title("5. The loss of the whole run")
    python("scripts/plot.py", "--run", run)

    title("6. Questions")
    right = ask(run)
    print(f"\n{right} of {len(demo_corpus.QUESTIONS)} right, {duration(time.monotonic() - start_s)} in all. "
          f"Now talk with it: python scripts/chat.py --run {os.path.relpath(run)}")  # fmt: skip
    return 0 if right >= 4 else 1


def title(text: str) -> None:
    """A heading between the steps' own output."""
    print(f"\n== {text}", flush=True)


def python(script: str, *arguments: str | Path) -> None:
    """Run one of the project's programs as a user would, its output on this terminal."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    print(f"$ python {script} {' '.join(map(show, arguments))}", flush=True)
    code = subprocess.run(command).returncode
    if code:
        raise UserError(f"{script} ended with exit code {code}: see its message above")


def show(argument: str | Path) -> str:
    """An argument as one would type it."""
    text = os.path.relpath(argument) if os.path.isabs(argument) else str(argument)
    return f'"{text}"' if " " in text else text


def finished(run: Path) -> bool:
    """True when the run's log says that it came to its end."""
    return any(e.get("event") == "finished" for e in read_lines(run / "events.jsonl"))


def train_and_kill(train: list[str], run: Path) -> None:
    """Start training and SIGKILL it, as a lost VM would, once a checkpoint is committed and KILL_AFTER steps are logged."""
    print(f"$ python {train[0]} {' '.join(map(show, train[1:]))}", flush=True)
    process = subprocess.Popen([sys.executable, str(ROOT / train[0]), *train[1:]])
    while process.poll() is None:
        steps = read_lines(run / "metrics.jsonl")
        if steps and steps[-1].get("step", 0) >= KILL_AFTER and checkpoint.committed(str(run)):
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            print(f"kill -9 {process.pid}: the trainer is gone", flush=True)
            return
        time.sleep(0.1)
    raise UserError(f"training ended by itself with exit code {process.returncode}: see its message above")


def ask(run: Path) -> int:
    """Put the demo's questions to the model, always taking the likeliest token; returns how many answers are right."""
    model, tokenizer = load_model(str(run))
    right = 0
    for question, expected, why in demo_corpus.QUESTIONS:
        ids = tokenizer.render([("user", question)], reply=True)
        stops = (tokenizer.end_of_turn, tokenizer.end_of_text)
        reply = tokenizer.decode(generate(model, [ids], max_tokens=40, temperature=0, stop_ids=stops)[0])
        good = expected.lower() in reply.lower()
        right += good
        print(f"{'right' if good else 'WRONG'}  {question}\n       {reply.strip()}   ({why})")
    return right


if __name__ == "__main__":
    flags.run(main)
