"""The executor of many machines: the same pure tasks on Ray, with the same results in the same order.

RAY_ADDRESS names the cluster ("auto": the one of this machine); without it Ray is started here for this run alone. A task
lost with its machine, or killed for lack of memory, is done again by Ray: tasks can be repeated at will.
"""

import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from cli.errors import Unfinished, UserError
from cli.stop import SIGNALS
from prep.pool import WORKER_ENVIRONMENT, in_order
from store import fs

T = TypeVar("T")
PROJECT = Path(__file__).resolve().parent.parent
RETRIES = 5  # of a task whose process or machine died
KEPT = 1 << 30  # bytes of freed memory: what `cli.memory.keep_freed_memory` does, told to processes that Ray starts
ENVIRONMENT = WORKER_ENVIRONMENT | {"MALLOC_MMAP_THRESHOLD_": str(KEPT), "MALLOC_TRIM_THRESHOLD_": str(KEPT)}
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_task_oom_retries": str(RETRIES),
}


class RayPool:
    """`with RayPool(workers, work, files, versions) as pool`: as `prep.pool.Pool`.

    `workers` counts for a Ray of its own; a cluster has its CPUs. Every node must see the folder `work` and the local
    `files`, and have the same `versions` of what makes bytes. Raises UserError where one does not.
    """

    def __init__(self, workers: int, work: Path, files: list[Path], versions: dict[str, str]) -> None:
        self.workers, self.work, self.files, self.versions = workers, work, files, versions

    def __enter__(self) -> "RayPool":
        import ray  # optional, and half a second

        self.ray = ray
        address = os.environ.get("RAY_ADDRESS")
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        modules = [str(PROJECT / name) for name in ("cli", "gpt", "prep", "store")]
        where = (
            {"address": address}
            if address
            # results are a few kB: Ray would reserve a third of the memory for them
            else {
                "address": "local",
                "num_cpus": self.workers,
                "include_dashboard": False,
                "object_store_memory": 80 << 20,
            }
        )
        if address and address != "auto":
            require_answer(address)
        handlers = {n: signal.getsignal(n) for n in SIGNALS}
        try:
            ray.init(
                **where,
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                runtime_env={"py_modules": modules, "env_vars": ENVIRONMENT},
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as e:
            hint = "; is RAY_AUTH_TOKEN that of the cluster?" if address else ""
            raise UserError(f"Ray at {address or 'this machine'}: {str(e).splitlines()[0]}{hint}") from e
        finally:
            for number, handler in handlers.items():  # Ray puts its own in their place, which print stack traces
                signal.signal(number, handler)
        self.workers = int(ray.cluster_resources().get("CPU", 1))
        self.require_reach()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.ray.shutdown()

    def require_reach(self) -> None:
        """Raises UserError naming the first node that cannot do the work of this one."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        token = secrets.token_hex(8)
        probe = self.work / f".seen-{token}"
        fs.put_bytes(str(probe), token.encode())
        try:
            for node in self.ray.nodes():
                if node["Alive"] and node["Resources"].get("CPU"):
                    here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                    on_node = self.ray.remote(what_is_missing).options(scheduling_strategy=here, max_retries=RETRIES)
                    if missing := self.result(on_node.remote(probe, token, self.files, self.versions)):
                        raise UserError(f"Ray node {node['NodeManagerAddress']}: {missing}")
        finally:
            probe.unlink(missing_ok=True)

    def run(self, work: Callable[..., T], tasks: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """`work(*task)` for each task, in order, at most 2 tasks per CPU under way. What a task raises is raised."""
        remote = self.ray.remote(work).options(max_retries=RETRIES)
        return in_order(lambda task: remote.remote(*task), self.result, tasks, under_way=2 * self.workers)

    def result(self, task: Any) -> Any:
        """What a task returned; what it raised, as it was; one line for what befell it."""
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayTaskError as e:
            raise e.cause from e
        except self.ray.exceptions.RayError as e:
            raise Unfinished(f"Ray: {type(e).__name__}: {' '.join(str(e).split())[:200]}: the same command "
                             "with --resume goes on") from e  # fmt: skip


def require_answer(address: str) -> None:
    """Raises UserError where nothing listens: Ray itself tries for minutes and fills the terminal."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as e:
        raise UserError(
            f"RAY_ADDRESS {address}: no Ray answers there ({e}); expected HOST:PORT of its head, or auto"
        ) from e


def what_is_missing(probe: Path, token: str, files: list[Path], versions: dict[str, str]) -> str | None:
    """What this machine lacks to do the tasks of another one, in words; None when it can do them."""
    shared = "all nodes must share the work folder (--work-dir) and local inputs, at the same paths"
    if not probe.exists() or probe.read_text() != token:
        return f"does not see {probe.parent}: {shared}"
    for path in files:
        if not path.exists():
            return f"does not see {path}: {shared}"
    for name, expected in versions.items():
        if version(name) != expected:
            return f"has {name} {version(name)}, not {expected}: bytes could differ; install the same on every node"
    return None
