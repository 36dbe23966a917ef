"""The clean pass done by many separate commands, as array schedulers start them: each its share, in any order.

Share I of N is every N-th task of the plan. All shares write to one work folder; `--finish` needs all of them.
"""

from pathlib import Path

from cli.errors import UserError
from prep.corpus import Task
from prep.stages import clean_marker
from store import fs

AGREED = "num-tasks"  # a file of the work folder: how many shares there are


def check(num_tasks: int | None, task_index: int | None, *, finish: bool, executor: str) -> None:
    """Refuse flags that cannot be meant together."""
    if finish and task_index is not None:
        raise UserError("--finish does the rest after every --task-index: leave one of the two out")
    if num_tasks is not None and num_tasks < 1:
        raise UserError(f"--num-tasks {num_tasks}: expected 1 or more")
    if task_index is not None and num_tasks is None:
        raise UserError(f"--task-index {task_index}: of how many? give --num-tasks too")
    if task_index is None and num_tasks is not None and not finish:
        raise UserError(f"--num-tasks {num_tasks}: give each command its --task-index, 0 to {num_tasks - 1}")
    if task_index is not None and task_index >= num_tasks:
        raise UserError(f"--task-index {task_index}: expected 0 to {num_tasks - 1}")
    if task_index is not None and executor == "ray":
        raise UserError("--executor ray spreads the tasks itself: leave --num-tasks and --task-index out")


def agree(work: Path, num_tasks: int) -> None:
    """All shares must be cut alike: raises UserError when others were begun with another --num-tasks."""
    fs.create(str(work / AGREED), str(num_tasks).encode())
    first = int((work / AGREED).read_bytes())
    if first != num_tasks:
        raise UserError(f"--num-tasks {num_tasks}: others were begun with --num-tasks {first}: give that, "
                        "or let one command without --num-tasks go on with --resume")  # fmt: skip


def require_all(tasks: list[Task], work: Path, num_tasks: int | None) -> None:
    """Raises UserError naming each --task-index that is not done yet."""
    try:
        agreed = int((work / AGREED).read_bytes())
    except FileNotFoundError:
        raise UserError(f"--finish: no --task-index has been run in {work}: run them all first") from None
    if num_tasks not in (None, agreed):
        raise UserError(f"--num-tasks {num_tasks}: the tasks were begun with --num-tasks {agreed}")
    missing = sorted({t.index % agreed for t in tasks if not clean_marker(t, work).exists()})
    if missing:
        raise UserError(f"--finish: of --num-tasks {agreed} these --task-index are not done: "
                        f"{', '.join(map(str, missing))}: run them, then this again")  # fmt: skip
