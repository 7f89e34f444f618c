"""Metrics of several worker processes in the files of one folder, as prometheus_client has it, and their sum.

Files are named by the worker's number, not by its process id: the worker that is started in the place of a dead one
goes on with its counters, so that no counter ever falls and no files pile up. Knows no metric by name but one.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
VERSIONS = "scaledown_checkpoint_info"  # what a `checkpoint` label must have here to be shown
FORGOTTEN = -1  # the value of a version that is unloaded


def share_metrics(folder: Path, process: str) -> None:
    """From now on this process's metrics are files of `folder`. Call it before the first metric is made."""
    os.environ[VARIABLE] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: process)


def shared_folder() -> Path | None:
    """Where the metrics of several processes meet; None: this process shows its own only."""
    return Path(os.environ[VARIABLE]) if getattr(values.ValueClass, "_multiprocess", False) else None


def clear(folder: Path) -> None:
    """Make the folder, and remove what an earlier run left in it. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in (*folder.glob("*.db"), *folder.glob("*.pid")):
        left.unlink()


def note_worker(folder: Path, number: int, pid: int) -> None:
    """A worker process has started: its memory and processor time belong to the metrics."""
    with contextlib.suppress(OSError):  # a full disk costs metrics, no worker
        folder.mkdir(parents=True, exist_ok=True)  # whatever tidies /tmp may have taken it; the worker writes there too
        (folder / f"worker_{number}.pid").write_text(str(pid))


def forget_worker(folder: Path, number: int) -> None:
    """A worker process has ended: its gauges are no longer true, its counters are."""
    with contextlib.suppress(OSError):
        (folder / f"worker_{number}.pid").unlink(missing_ok=True)
        mark_process_dead(number, str(folder))


class SharedCollector(Collector):
    """Every worker's metrics in one: summed, or what each gauge's mode says; `process_*` with a label `worker`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._folder = Path(os.environ[VARIABLE])
        self._files = MultiProcessCollector(None, str(self._folder))
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """Nothing ahead of time: what there is, the files say."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """All metrics, without those of checkpoint versions that no worker has."""
        metrics = list(self._files.collect())
        versions = [sample for metric in metrics if metric.name == VERSIONS for sample in metric.samples]
        known = {sample.labels["checkpoint"] for sample in versions if sample.value != FORGOTTEN}
        for metric in metrics:
            metric.samples = [s for s in metric.samples if s.labels.get("checkpoint") in {None, *known}]
            yield metric
        yield from self._processes()

    def _processes(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        for file in sorted(self._folder.glob("worker_*.pid")):
            with contextlib.suppress(OSError, ValueError):  # a worker that ends or starts just now
                pid = int(file.read_text())
                for metric in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                    one = found.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                    for sample in metric.samples:
                        one.add_sample(sample.name, {"worker": file.stem.removeprefix("worker_")}, sample.value)
        return found.values()
