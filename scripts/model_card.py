"""A model card filled from the run's own records; what they do not tell is left for the owner to write."""

import datetime
import math
import re
from dataclasses import dataclass
from typing import Any

from cli.errors import UserError
from cli.progress import count, duration
from gpt.model import GPT, flops_per_token
from scripts.goodput import summarize
from scripts.plot import draw, read_log
from store import fs
from store.errors import NotFound
from store.shards import TokenShards
from train.ledger import attempts, read_events

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
# license: name one before you publish; the data's licences bind you too
---

# A {kind} model trained with Perennial

{about}

## What it says

{samples}

## Loss

{curve}

## Data

{data}

## Cost

{cost}

## Use

```python
from transformers import pipeline

chat = pipeline("text-generation", "path/to/this/folder")
print(chat([{{"role": "user", "content": "Hello!"}}]))
```

## Licence

*Name the licence of the model here. That of the data, and what it asks of those who use it, comes first.*
"""
KINDS = {"gpt2": "GPT-2", "modern": "Qwen3-shaped GPT"}
IMPORTED = "None here: these weights were imported."
NOT_TOLD = "*Say what it was trained on, how that was cleaned, and under which licences it may be used.*"


@dataclass(frozen=True)
class Records:
    """What a run and its dataset tell, read before anything is written."""

    metrics: list[dict[str, Any]]
    events: str
    samples: str  # of the newest step that has any, up to the exported one
    metadata: dict[str, Any] | None  # of the dataset, where it was named


def read_card(run: str, model: GPT, record: dict[str, Any], *, data: str, price_per_hour: float | None) -> str:
    """The card of a checkpoint (its state.json is `record`). Raises UserError where `data` is not what it was trained on."""
    step = record["step"]
    metadata = None
    if data and fs.exists(fs.join(data, "metadata.json")):
        tokens = TokenShards(data)
        if tokens.fingerprint != record["data"]["fingerprint"]:
            raise UserError(f"--data {fs.redact(data)}: is not the dataset this run was trained on (its tokens differ)")
        metadata = tokens.metadata
    elif data:
        raise UserError(f"--data {fs.redact(data)}: no token dataset there (no metadata.json)")
    metrics = read_log(run, "metrics.jsonl") if fs.exists(fs.join(run, "metrics.jsonl")) else []
    try:
        events = fs.read_bytes(fs.join(run, "events.jsonl")).decode("utf-8", "replace")
    except NotFound:
        events = ""
    metrics = [m for m in metrics if m.get("step", 0) <= step]
    return card(model, record, Records(metrics, events, newest_samples(run, step), metadata), price_per_hour)


def newest_samples(run: str, step: int) -> str:
    """The newest samples that training wrote up to a step; empty when there are none."""
    found = {int(m[1]): e.name for e in fs.list_folder(fs.join(run, "samples"))
             if (m := re.fullmatch(r"step-(\d+)\.txt", e.name)) and int(m[1]) <= step}  # fmt: skip
    return fs.read_text(fs.join(run, "samples", found[max(found)])) if found else ""


def card(model: GPT, record: dict[str, Any], records: Records, price_per_hour: float | None) -> str:
    """The text; pure."""
    return CARD.format(
        kind=KINDS[model.config.arch],
        about=table([("", ""), *about(model, record, records.metrics)]),
        samples=f"```\n{records.samples.strip()}\n```" if records.samples else "*No samples were kept.*",
        curve=curve(records.metrics),
        data=data_section(records.metadata) + fingerprint(record),
        cost=IMPORTED if record.get("imported") else cost_section(model, record, records.events, price_per_hour),
    )


def table(rows: list[tuple[str, ...]]) -> str:
    """Markdown; the first row is the head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def about(model: GPT, record: dict[str, Any], metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Shape, training and result, (name, text) each."""
    config, c = record["config"], model.config
    rows = [
        ("parameters", f"{model.num_params() / 1e6:.1f} M"),
        ("shape", f"{c.n_layer} layers, {c.n_head} heads, {c.n_embd} wide, context {c.block_size}, vocabulary {c.vocab_size}"),
    ]  # fmt: skip
    if record["step"]:
        rows += [
            ("trained", f"{record['step']:,} steps of {config['batch']} x {config['block_size']} = {count(record['tokens'])} tokens "
                        f"in {duration(record['elapsed_s'])}"),
            ("optimizer", f"{config.get('optimizer', 'adamw')}, peak learning rate {config['lr']:g}, {config['schedule']}, "
                          f"weight decay {config['weight_decay']:g}"),
        ]  # fmt: skip
    losses = [m["loss"] for m in metrics if m.get("loss") is not None][-100:]
    if losses:
        rows.append(("training loss", f"{sum(losses) / len(losses):.3f} (mean of the last {len(losses)} steps)"))
    if vals := validation_losses(metrics):
        rows.append(("validation loss", f"{vals[-1][1]:.4f}, perplexity {math.exp(min(vals[-1][1], 50)):.1f}"))
    return rows


def validation_losses(metrics: list[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(m["step"], m["val_loss"]) for m in metrics if m.get("val_loss") is not None]


def curve(metrics: list[dict[str, Any]]) -> str:
    """The loss curve as text, and validation losses as a table of at most a dozen rows."""
    losses = {m["step"]: m["loss"] for m in metrics if m.get("loss") is not None}
    if not losses:
        return "*No steps were logged.*"
    vals = validation_losses(metrics)
    drawn = f"```\n{draw(losses, dict(vals), [], width=72, height=12)}\n```"
    rows = [(f"{step:,}", f"{loss:.4f}") for step, loss in thinned(vals, 12)]
    return f"{drawn}\n\n{table([('step', 'validation loss'), *rows])}" if rows else drawn


def thinned(rows: list[Any], n: int) -> list[Any]:
    """At most n of the rows, evenly, the last one among them."""
    return [rows[round(i * (len(rows) - 1) / max(min(n, len(rows)) - 1, 1))] for i in range(min(n, len(rows)))]


def data_section(metadata: dict[str, Any] | None) -> str:
    """What the dataset's own records tell of sources, cleaning and duplicates."""
    if metadata is None:
        return f"{NOT_TOLD}\n"
    counts, settings, totals = metadata["counts"], metadata["job"]["settings"], metadata["totals"]
    rows = [("source", "bytes")]
    rows += [(str(name).rpartition("/")[2], f"{size:,}") for name, size, *_ in metadata["job"]["sources"]]
    dropped = {k.removeprefix("dropped_"): n for k, n in counts.items() if k.startswith("dropped_") and n}
    changed = {k.removeprefix("changed_"): n for k, n in counts.items() if k.startswith("changed_") and n}
    lines = [
        table(rows),
        "",
        f"{counts['encoded']:,} of {counts['documents']:,} documents were kept: {totals['train']['tokens']:,} tokens to train on, "
        f"{totals['val']['tokens']:,} to validate.",
        "",
        f"- Cleaning: `{settings['clean']}`. Documents changed, by rule: {listed(changed)}.",
        f"- Left out: {listed(dropped)}. Duplicates ({settings['dedup']}): {counts.get('duplicates', 0):,}.",
        "",
        NOT_TOLD,
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items()) or "none"


def fingerprint(record: dict[str, Any]) -> str:
    """The line that names the dataset by its tokens."""
    digest = record["data"]["fingerprint"]
    return f"\nThe dataset's fingerprint is `{digest[:16]}`." if digest else ""


def cost_section(model: GPT, record: dict[str, Any], events: str, price_per_hour: float | None) -> str:
    """Time on which machines, over all restarts, and its price if one is given; FLOPs by PaLM's formula."""
    flops = flops_per_token(model.config) * record.get("tokens", 0)
    lines = [f"- {flops:.2g} FLOPs of training (6 N and attention, for each token)."]
    if found := attempts(read_events(events)[0]):
        summary = summarize(found, price=price_per_hour, paid_when_down=False)
        machines = sorted({a.machine for a in found if a.machine})
        began = datetime.datetime.fromtimestamp(found[0].began_s, datetime.UTC)
        lines.append(f"- {duration(summary['paid_s'])} on {', '.join(machines) or 'an unnamed machine'} in {len(found)} "
                     f"start{'s' if len(found) > 1 else ''} from {began:%Y-%m-%d}; {summary['goodput']:.0%} of it was training.")  # fmt: skip
        if price_per_hour is not None:
            lines.append(f"- {summary['money']['paid']:.2f} at {price_per_hour:g} an hour.")
    return "\n".join(lines)
