"""What events.jsonl tells over all restarts: where the time went, and what each crash cost. Pure, of untrusted lines.

An attempt is one start of the trainer. Its time is split into parts that add up to it exactly:

    start      imports, checkpoint, model, first step       data     until the first shards were there
    compile    torch.compile                                aside    validation, samples
    saving     the loop held up by a save; the last one     lost     steps that a later attempt had to do again
    useful     steps that count
"""

import datetime
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from store.untrusted import parse_json

ENDS = ("finished", "stopped", "diverged", "unsaved", "fenced")  # events of an attempt that ended by itself
PARTS = ("useful", "lost", "start", "data", "compile", "aside", "saving")
ASIDE = ("evaluated", "sampled")


def iso(timestamp: float) -> str:
    """Seconds since 1970 as an event's `time`."""
    return datetime.datetime.fromtimestamp(timestamp, datetime.UTC).isoformat(timespec="milliseconds")


def crash_found(
    events: list[dict[str, Any]], metrics: list[dict[str, Any]], step: int, lease: dict[str, Any] | None,
    logged_s: float | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """What is known of an end that the last attempt did not tell of, as the next one begins at `step`; None without one.

    `lease` is what its holder last wrote, every 15 seconds; `logged_s` when, since 1970, it last wrote to metrics.jsonl,
    if that is known here. Steps after both, which were not logged yet, are not known of.
    """
    if not events:
        return None
    last = events[-1]
    of = last.get("attempt")
    told = any(e.get("event") in ENDS for e in events if e.get("attempt") == of)
    beat = lease if lease and lease.get("epoch") == of else {}
    last_step = max((n for n in (beat.get("step"), *(m.get("step") for m in metrics)) if isinstance(n, int)), default=0)
    if told and last_step <= step:
        return None
    seen = [iso(s) for s in (beat.get("time"), logged_s) if isinstance(s, int | float) and 0 < s < 1e11]
    last_time = max([*seen, *([last["time"]] if isinstance(last.get("time"), str) else [])], default=None)
    return {"of": of, "last_step": last_step, "last_time": last_time, "steps_lost": max(last_step - step, 0)}


@dataclass(frozen=True)
class Event:
    """One well-formed line. `up_s`: seconds since its process began, which no wall clock moves."""

    time_s: float
    up_s: float | None
    attempt: int
    name: str
    fields: dict[str, Any]

    def number(self, key: str) -> float:
        """A field that is a number of seconds or steps; 0 where it is nothing of the kind."""
        return _number(self.fields.get(key)) or 0.0

    def text(self, key: str) -> str:
        """A field to be shown: one short line, whatever it holds."""
        value = self.fields.get(key)
        return "".join(c if c.isprintable() else "?" for c in value[:60]) if isinstance(value, str) else ""


@dataclass
class Attempt:
    """One start of the trainer, and what became of it."""

    number: int
    host: str
    machine: str
    began_s: float  # since 1970
    seconds: float
    first_step: int  # it went on from
    last_step: int
    ended: str
    crashed: bool
    steps_lost: int = 0
    parts: dict[str, float] = field(default_factory=dict)  # PARTS -> seconds

    @property
    def ended_s(self) -> float:
        """When, since 1970."""
        return self.began_s + self.seconds


def read_events(text: str) -> tuple[list[Event], int]:
    """The events of a file, and how many of its lines are none."""
    events, ignored = [], 0
    for line in filter(str.strip, text.split("\n")):
        event = _event(line)
        if event:
            events.append(event)
        else:
            ignored += 1
    return events, ignored


def _event(line: str) -> Event | None:
    try:
        fields = parse_json(line)
        time_s = datetime.datetime.fromisoformat(fields["time"]).timestamp()
        attempt, name = fields["attempt"], fields["event"]
        if type(attempt) is not int or not 0 <= attempt < 1e9 or not isinstance(name, str) or not 0 <= time_s < 1e11:
            return None
        return Event(time_s, _number(fields.get("up_s")), attempt, name, fields)
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def _number(value: Any) -> float | None:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e10
    return float(value) if fits else None


def attempts(events: Iterable[Event], logged_step: int = 0) -> list[Attempt]:
    """The attempts in their order. `logged_step`: the newest in metrics.jsonl, which the last attempt has reached."""
    own: dict[int, list[Event]] = {}
    crashes: dict[int, Event] = {}
    for e in events:
        own.setdefault(e.attempt, []).append(e)
        if e.name == "crash_found":
            crashes[int(e.number("of"))] = e
    numbers = sorted(n for n, mine in own.items() if any(e.name == "start" for e in mine))
    found = [_attempt(own[n], crashes.get(n), n == numbers[-1], logged_step) for n in numbers]
    resumed = float("inf")  # the earliest step that a later attempt began at: what came after it was done again
    for a in reversed(found):
        a.steps_lost = a.last_step - int(max(a.first_step, min(a.last_step, resumed)))
        share = a.steps_lost / max(a.last_step - a.first_step, 1)
        a.parts["lost"] = a.parts["useful"] * share
        a.parts["useful"] -= a.parts["lost"]
        resumed = min(resumed, a.first_step)
    return found


def _attempt(mine: list[Event], crash: Event | None, newest: bool, logged_step: int) -> Attempt:
    start = next(e for e in mine if e.name == "start")
    began_s = start.time_s - (start.up_s or 0.0)

    def up_s(e: Event) -> float:
        return e.up_s if e.up_s is not None else max(e.time_s - began_s, 0.0)

    seconds = max(map(up_s, mine))
    end = next((e for e in reversed(mine) if e.name in ENDS), None)
    if end is None and crash:
        next_s = crash.time_s - (crash.up_s or 0.0)  # where a wall clock was moved: it ended before the next one began
        seconds = max(seconds, min(_seen_s(crash), next_s) - began_s)
    steps = [e.number("step") for e in mine] + [crash.number("last_step") if crash else 0.0]
    if newest:
        steps.append(float(logged_step))
    over = crash is not None or not newest

    left_s, parts = seconds, dict.fromkeys(PARTS, 0.0)

    def take(part: str, wanted_s: float) -> None:
        nonlocal left_s
        parts[part] += min(wanted_s, left_s)
        left_s -= min(wanted_s, left_s)

    first = next((e for e in mine if e.name == "first_step"), None)
    after_s = seconds - min(up_s(first), seconds) if first else 0.0  # after the first step
    left_s -= after_s
    take("data", start.number("data_s"))
    take("compile", sum(e.number("seconds") for e in mine if e.name == "compiled"))
    take("start", left_s)
    left_s = after_s
    take("aside", sum(e.number("seconds") for e in mine if e.name in ASIDE))
    take("saving", sum(e.number("stall_s") for e in mine if e.name == "saved"))
    closing = {"stopped": "signal", "finished": "save_begun"}.get(end.name if end else "")
    began = next((e for e in reversed(mine) if e.name == closing), None)
    take("saving", seconds - up_s(began) if began else 0.0)
    take("useful", left_s)
    return Attempt(
        number=start.attempt, host=start.text("host"), machine=start.text("machine"), began_s=began_s, seconds=seconds,
        first_step=int(start.number("step")), last_step=int(max(*steps, start.number("step"))),
        ended=_ended(end, over), crashed=end is None and over, parts=parts,
    )  # fmt: skip


def _seen_s(crash: Event) -> float:
    """When the crashed attempt was last seen, since 1970."""
    try:
        return datetime.datetime.fromisoformat(crash.fields["last_time"]).timestamp()
    except (KeyError, ValueError, TypeError, OverflowError):
        return float("-inf")


def _ended(end: Event | None, over: bool) -> str:
    if end is None:
        return "crashed" if over else "running, or gone"
    if end.name != "stopped":
        return end.name
    late = "" if end.fields.get("in_time", True) else ", its grace too short"
    return f"stopped by {end.text('signal') or 'a signal'}{late}"


def totals(found: list[Attempt]) -> dict[str, float]:
    """Seconds of each part over all attempts, `paid`: their sum, and `down`: between them."""
    parts = {part: sum(a.parts[part] for a in found) for part in PARTS}
    down = sum(max(b.began_s - a.ended_s, 0.0) for a, b in itertools.pairwise(found))
    return {**parts, "paid": sum(parts.values()), "down": down}
