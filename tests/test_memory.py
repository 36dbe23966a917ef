"""Law 7: memory does not grow with the corpus, nor with the steps."""

import contextlib
import subprocess

import psutil

from tests.helpers import start


def peak_mb(process: subprocess.Popen) -> float:
    """The most memory a program and its children held together, looked at ten times a second until it ends well."""
    peak = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]))
        except psutil.NoSuchProcess:
            continue
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    assert process.returncode == 0
    return peak / 1e6


def test_preparation_of_four_times_the_text_takes_the_same_memory(corpus, tmp_path):
    peaks = []
    for times in (40, 160):
        text = tmp_path / f"{times}.txt"
        with open(text, "wb") as f:
            for _ in range(times):
                f.write(corpus.read_bytes() + b"\n\n")
        flags = ("--vocab-size", 512, "--dedup", "off", "--workers", 1, "--compress", "--shard-tokens", "4M")
        peaks.append(peak_mb(start("prep/tokenize_bpe.py", "--input", text, "--output", tmp_path / str(times), *flags)))
    assert peaks[1] < peaks[0] + 40, peaks  # 72 MB more text; the memory-mapped parts of one shard come and go


def test_training_longer_takes_the_same_memory(data, tmp_path):
    flags = ("--data", data, "--model", "tiny", "--n-embd", 32, "--n-head", 2, "--block-size", 32, "--batch", 8,
             "--log-every", 20, "--eval-every", 50, "--sample-every", 100, "--save-every", 50, "--eval-tokens", 512)  # fmt: skip
    peaks = [
        peak_mb(
            start("train/run.py", *flags, "--steps", steps, "--out", tmp_path / str(steps), stdout=subprocess.DEVNULL)
        )
        for steps in (100, 1000)
    ]
    assert peaks[1] < peaks[0] + 25, peaks
