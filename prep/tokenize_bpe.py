"""Turn a text corpus into a BPE tokenizer and a dataset of token shards.

    python prep/tokenize_bpe.py --input corpus.txt --compress

Stages: read and clean -> choose -> train the tokenizer -> encode -> shuffle into shards -> metadata. Killed at any
moment, the same command with --resume goes on; the output depends on input bytes, settings and seed alone.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import hashlib
import json
import platform
import resource
import shlex
import shutil
import time
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any, Literal

from cli import flags
from cli.errors import USER_ERRORS, UserError
from cli.flags import flag
from cli.progress import Meter, count, duration
from gpt.tokenizer import SPLIT_PATTERNS, Tokenizer
from prep import bpe, corpus, encode, merge, parts, stages
from prep.pool import Pool, usable_cpus
from store import fs, lock
from store.errors import StoreError
from store.shards import TokenShards, default_cache, dtype_for, write_metadata


@dataclass(frozen=True)
class Settings:
    """Every flag. Those in FREE change neither output bytes nor meaning, and may change when a run is resumed."""

    input: tuple[str, ...] = flag((), "files, folders, globs or URLs: .txt or .jsonl, also .gz .bz2 .xz .zst")
    output: str = flag("", "folder or URL of the dataset (default: beside the input, named after it: NAME-tokens)")
    vocab_size: int = flag(32000, "tokens in the vocabulary, the five special ones included")
    compress: bool = flag(False, "store shards as zstd, about half the size")
    level: int = flag(3, "zstd level for --compress: 3 writes at 180 MB/s a core, 9 stores 11 percent less at 45 MB/s")
    val_fraction: float = flag(0.01, "share of documents kept for validation, chosen by their hash")
    min_frequency: int = flag(2, "how often a pair must occur to become a token")
    tokenizer: str = flag("", "reuse this tokenizer.json instead of training one")
    tokenizer_sample: int = flag(256_000_000, "bytes of text, spread over the corpus, that the tokenizer is trained on")
    split_pattern: Literal[tuple(SPLIT_PATTERNS)] = flag("o200k", "how text is cut into words before BPE")
    trainer: Literal["auto", "ffbpe", "tokenizers"] = flag("auto", "tokenizer trainer; auto: ffbpe where installed")
    clean: Literal["off", "light", "standard", "strict"] = flag("standard", "cleaning rules (prep/clean.py lists them)")
    dedup: Literal["exact", "off"] = flag("exact", "drop documents that are equal to an earlier one")
    shard_tokens: int = flag(100_000_000, "tokens per shard")
    limit: int | None = flag(None, "use only the first bytes of the input, for a trial: 50MB")
    seed: int = flag(1, "seed of the shuffle, the validation split and the samples")
    workers: int = flag(0, "processes (default: one per CPU)")
    work_dir: str = flag("", "folder for temporary files (default: inside a local output, else the cache)")
    resume: bool = flag(False, "go on with an interrupted run; the same command is right the first time too")


LOCK = ".lock"
FREE = {"workers", "work_dir", "resume", "output", "input"}


def main(argv: list[str] | None = None) -> int:
    """Run preparation. Raises one of USER_ERRORS for what a user can set right; then nothing new is left behind."""
    start_s = time.monotonic()
    settings, given = flags.parse(Settings, argv, prog="tokenize_bpe.py", description=__doc__.split("\n")[0])
    check(settings)
    if settings.tokenizer and "vocab_size" in given:
        raise UserError("--vocab-size is the given --tokenizer's: leave one of the two out")
    sources = corpus.find_sources(settings.input)
    output = settings.output or default_output(settings.input[0])
    trainer = "given" if settings.tokenizer else bpe.choose_trainer(settings.trainer)
    given_tokenizer = bpe.load(settings.tokenizer, read_text(settings.tokenizer)) if settings.tokenizer else None
    job = describe_job(settings, sources, trainer, given_tokenizer)
    work = work_folder(output, settings.work_dir)
    if already_complete(output, job, settings.resume):
        shutil.rmtree(work, ignore_errors=True)  # a kill between the last write and this can have left it
        print(f"{fs.redact(output)} is complete already; nothing to do")
        return 0
    created = open_work_folder(work, output, job, settings.resume)
    try:
        with Pool(settings.workers or usable_cpus()) as pool:
            report = build(settings, sources, output, work, pool, job, trainer, given_tokenizer)
    except USER_ERRORS as e:
        # a fresh run that cannot succeed leaves nothing half-made; one whose storage failed can go on with --resume
        if created and not isinstance(e, StoreError):
            shutil.rmtree(work, ignore_errors=True)
            remove_shards(output)
        raise
    except KeyboardInterrupt:
        print("stopped; the same command with --resume goes on", file=sys.stderr)
        return 130
    shutil.rmtree(work, ignore_errors=True)
    show_summary(output, report, time.monotonic() - start_s)
    return 0


def build(
    settings: Settings, sources: list[corpus.Source], output: str, work: Path, pool: Pool, job: dict[str, Any],
    trainer: str, given_tokenizer: tuple[str, list[str]] | None,
) -> dict[str, Any]:  # fmt: skip
    """The visible sequence of stages. Returns the report."""
    tasks = corpus.plan(sources, settings.limit)
    kinds = Counter(s.kind for s in sources)
    print(f"input      {len(sources)} file{'s' * (len(sources) != 1)}, {count(sum(t.size for t in tasks))}B "
          f"({', '.join(f'{n} {k}' for k, n in kinds.items())}); {pool.workers} workers", flush=True)  # fmt: skip

    cleaned = stages.clean_corpus(tasks, work, rule_set=settings.clean, pool=pool)
    if not cleaned.counts["kept"]:
        why = f"all {cleaned.counts['documents']} documents were dropped ({dropped(cleaned.counts)}); try --clean light"
        raise UserError(f"{', '.join(settings.input)}: {why if cleaned.counts['documents'] else 'the corpus is empty'}")
    selection = stages.select(
        cleaned,
        deduplicate=settings.dedup == "exact",
        val_fraction=settings.val_fraction,
        sample_bytes=settings.tokenizer_sample,
        seed=settings.seed,
    )

    tokenizer = Tokenizer(make_tokenizer(settings, cleaned, selection, work, trainer, given_tokenizer))
    engine, warning = encode.choose_engine(tokenizer, stages.proof_texts(cleaned))
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    dtype = dtype_for(tokenizer.vocab_size)
    encoded = stages.encode_parts(cleaned, selection, work, engine=engine, dtype=dtype, seed=settings.seed, pool=pool)
    shards = stages.write_shards(
        merge.plan_shards(encoded, settings.shard_tokens), encoded, output, work,
        dtype=dtype, level=settings.level if settings.compress else None, pool=pool,
    )  # fmt: skip

    report = make_report(cleaned, selection, shards)
    fs.put_bytes(fs.join(output, "tokenizer.json"), tokenizer.json_text.encode())
    fs.put_bytes(fs.join(output, "report.json"), json.dumps(report, indent=1, ensure_ascii=False).encode())
    fs.delete_leftovers(output)
    write_metadata(
        output,
        shards,
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        tokenizer_sha256=hashlib.sha256(tokenizer.json_text.encode()).hexdigest(),
        totals=report["totals"],
        counts=report["counts"],
        split_rule="a document validates when the seeded hash of its content is below val_fraction",
        job=job,
        # no engine, no date, no machine: the same input and settings give the same bytes everywhere
        versions={name: version(name) for name in ("tokenizers", "zstandard", *(["ffbpe"] * (trainer == "ffbpe")))},
    )
    return report


def make_tokenizer(
    settings: Settings, cleaned: stages.Cleaned, selection: stages.Selection, work: Path,
    trainer: str, given: tuple[str, list[str]] | None,
) -> str:  # fmt: skip
    """tokenizer.json: the given one, the one an interrupted run had trained, or a new one."""
    path, marker = work / "tokenizer.json", work / "tokenizer.marker"
    if parts.load_marker(marker):
        return path.read_text("utf-8")
    if given:
        text, added = given
        if added:
            print(f"tokenizer  {settings.tokenizer} has no {', '.join(added)}: added after its last id")
    else:
        with Meter("tokenizer", selection.sample_bytes, "B") as meter:
            text = bpe.train(
                stages.sample_batches(cleaned, selection, meter),
                vocab_size=settings.vocab_size,
                min_frequency=settings.min_frequency,
                split=settings.split_pattern,
                trainer=trainer,
            )
    fs.put_bytes(str(path), text.encode())
    parts.save_marker(marker, {}, [path])
    return text


# ---- before the stages ----------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Refuse settings that cannot be meant, before anything is read."""
    if not all(i.strip() for i in settings.input or ("",)):
        raise UserError("--input is missing: name a file, folder, glob or URL (.txt or .jsonl)")
    if settings.vocab_size < bpe.MIN_VOCAB and not settings.tokenizer:
        raise UserError(
            f"--vocab-size {settings.vocab_size}: at least {bpe.MIN_VOCAB} are needed (256 bytes and 5 special)"
        )
    if not 0 <= settings.val_fraction <= 0.5:
        raise UserError(f"--val-fraction {settings.val_fraction}: expected 0 to 0.5")
    if not 1 <= settings.level <= 19:
        raise UserError(f"--level {settings.level}: expected 1 to 19")
    for name in ("min_frequency", "shard_tokens", "tokenizer_sample", "limit"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 1 or more")


def default_output(first_input: str) -> str:
    """Beside the input and named after it: corpus.txt.gz -> corpus-tokens; a glob is named after its folder."""
    if first_input.startswith(("http://", "https://")):
        first_input = first_input.split("?")[0].rsplit("/", 1)[-1]  # cannot be written there: in this folder
    while any(c in first_input for c in "*?["):
        first_input = first_input.rpartition("/")[0] or "."
    if fs.is_local(first_input):
        first_input = str(fs.local_path(first_input).resolve()) if first_input in (".", "..") else first_input
    folder, slash, name = first_input.rstrip("/").rpartition("/")
    while Path(name).suffix.lower() in (*corpus.COMPRESSIONS, *corpus.TEXT_SUFFIXES, *corpus.JSON_SUFFIXES):
        name = Path(name).stem
    return f"{folder}{slash}{name}-tokens"


def read_text(url: str) -> str:
    """A small text file a flag names."""
    try:
        return fs.read_bytes(url).decode()
    except UnicodeDecodeError as e:
        raise UserError(f"{fs.redact(url)}: not UTF-8 text") from e


def describe_job(
    settings: Settings, sources: list[corpus.Source], trainer: str, given: tuple[str, list[str]] | None
) -> dict[str, Any]:
    """All that the output depends on: a resumed run must have the same. Names and sizes, no folders or credentials."""
    fixed = {k: v for k, v in asdict(settings).items() if k not in FREE} | {"trainer": trainer}
    fixed["tokenizer"] = hashlib.sha256(given[0].encode()).hexdigest() if given else ""
    files = [[fs.redact(s.url).rsplit("/", 1)[-1], s.size, s.kind, s.head_xxh3, s.group] for s in sources]
    return {"settings": fixed, "sources": files}


def work_folder(output: str, asked: str) -> Path:
    """Where temporary files go: inside a local output, else in this machine's cache."""
    if asked:
        return Path(asked).expanduser() / "perennial-prep"
    if fs.is_local(output):
        return fs.local_path(output) / ".prep"
    return default_cache() / "prep" / hashlib.sha256(output.encode()).hexdigest()[:16]


def already_complete(output: str, job: dict[str, Any], resume: bool) -> bool:
    """True when the output is the finished dataset of this very job. Raises UserError when it is anything else."""
    if not fs.exists(fs.join(output, "metadata.json")):
        return False
    if not resume:
        raise UserError(f"{fs.redact(output)}: exists already and is complete: give another --output, or delete it")
    same_job(TokenShards(output).metadata.get("job", {}), job, output)
    return True


def same_job(old: dict[str, Any], new: dict[str, Any], where: str) -> None:
    """Raises UserError naming the first setting or source that differs from the interrupted run's."""
    old_settings = old.get("settings", {})
    for name, value in new["settings"].items():
        if old_settings.get(name) != value:
            raise UserError(f"{fs.redact(where)}: was begun with --{name.replace('_', '-')} {old_settings.get(name)}, "
                            f"now it is {value}: give the old value, or another --output")  # fmt: skip
    if old.get("sources") != new["sources"]:
        raise UserError(f"{fs.redact(where)}: was begun from other input files, or they have changed: "
                        "give another --output, or delete it")  # fmt: skip


def open_work_folder(work: Path, output: str, job: dict[str, Any], resume: bool) -> bool:
    """Make or re-enter the work folder. Returns True when it is new."""
    job_path = work / "job.json"
    if job_path.exists():
        lock.hold(work / LOCK)
        if not resume:
            raise UserError(f"{fs.redact(output)}: holds an unfinished run: add --resume to go on, or delete it")
        same_job(json.loads(job_path.read_bytes()), job, output)
        return False
    others = [e.name for e in fs.list_folder(output) if e.name != ".prep"]
    if others:
        raise UserError(f"{fs.redact(output)}: exists and holds something else ({others[0]}): give another --output")
    lock.hold(work / LOCK)
    fs.put_bytes(str(job_path), json.dumps(job).encode())
    return True


def remove_shards(output: str) -> None:
    """Undo a failed fresh run: the folder was empty or absent before it."""
    if fs.is_local(output):
        for path in fs.local_path(output).glob("*.bin*"):
            path.unlink()
    fs.delete_folder(output)


# ---- after the stages -----------------------------------------------------------------------------------------------


def dropped(counts: Counter) -> str:
    """ "12 empty, 3 few_letters"."""
    return ", ".join(f"{n} {k.removeprefix('dropped_')}" for k, n in sorted(counts.items()) if k.startswith("dropped_"))


def make_report(cleaned: stages.Cleaned, selection: stages.Selection, shards: list[Any]) -> dict[str, Any]:
    """What went in, was dropped and came out."""
    counts = cleaned.counts
    totals = {
        split: {
            "tokens": sum(s.tokens for s in shards if s.split == split),
            "documents": sum(s.documents for s in shards if s.split == split),
            "stored_bytes": sum(s.stored_bytes for s in shards if s.split == split),
        }
        for split in ("train", "val")
    }
    return {
        "counts": dict(sorted(counts.items())) | {"duplicates": selection.duplicates},
        "examples_dropped": cleaned.examples,
        "tokenizer_sample_bytes": selection.sample_bytes,
        "totals": totals,
    }


def show_summary(output: str, report: dict[str, Any], elapsed_s: float) -> None:
    """The closing lines: what was made and what to do next."""
    counts, train, val = Counter(report["counts"]), report["totals"]["train"], report["totals"]["val"]
    tokens, stored = train["tokens"] + val["tokens"], train["stored_bytes"] + val["stored_bytes"]
    rest = dropped(counts)
    print(f"documents  {counts['kept'] - counts['duplicates']} kept of {counts['documents']}; "
          f"{counts['duplicates']} duplicates" + (f", {rest}" if rest else ""))  # fmt: skip
    if counts["invalid_utf8"]:
        print(f"warning: {counts['invalid_utf8']} invalid UTF-8 sequences were replaced by U+FFFD", file=sys.stderr)
    print(f"tokens     {train['tokens']:,} train, {val['tokens']:,} val in {count(stored)}B "
          f"({stored / max(tokens, 1):.2f} bytes each); "
          f"{counts['kept_bytes'] / max(tokens, 1):.2f} bytes of text per token")  # fmt: skip
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss: bytes there, KiB here
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * unit
    print(f"done       in {duration(elapsed_s)}, {count(counts['bytes'] / elapsed_s)}B/s; "
          f"largest process {count(peak)}B of memory")  # fmt: skip
    print(f"next       python train/run.py --data {shlex.quote(fs.redact(output))} --resume", flush=True)


if __name__ == "__main__":
    flags.run(main, outlives_stdout=True)
