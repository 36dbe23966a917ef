"""Law 7: memory does not grow with the corpus, nor with the steps."""

import contextlib
import subprocess

import psutil

from tests.helpers import start


def peak_mb(process: subprocess.Popen) -> float:
    """The most memory of its own a program and its children held together, looked at ten times a second until it ends well.

    Pages of memory-mapped files, which the kernel takes back at will, do not count.
    """
    peak = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            memory = [p.memory_info() for p in [root, *root.children(recursive=True)]]
            peak = max(peak, sum(m.rss - getattr(m, "shared", 0) for m in memory))
        except psutil.NoSuchProcess:
            continue
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.1)
    assert process.returncode == 0
    return peak / 1e6


def test_preparation_of_four_times_the_text_takes_the_same_memory(corpus, tmp_path):
    """But for about a hundred bytes a document, the arrays in which order and duplicates are decided."""
    conversations = corpus.read_text("utf-8").split("\n\n")
    long = [
        "\n".join(conversations[i : i + 20]) for i in range(0, len(conversations), 20)
    ]  # some kilobytes each, as real ones
    peaks = []
    for times in (80, 320):
        text = tmp_path / f"{times}.txt"
        with open(text, "w", encoding="utf-8") as f:
            for _ in range(times):
                f.write("\n\n".join(long) + "\n\n")
        flags = ("--vocab-size", 512, "--dedup", "off", "--workers", 1, "--compress", "--shard-tokens", "4M")
        peaks.append(peak_mb(start("prep/tokenize_bpe.py", "--input", text, "--output", tmp_path / str(times), *flags)))
    assert peaks[1] < peaks[0] + 70, peaks  # 144 MB more text; the allocator itself goes up and down by 20 to 40


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
