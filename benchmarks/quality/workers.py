"""Trainings side by side, and what came of them, kept on disk."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed

import numpy as np
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.quality.quiet import silence


class Results:
    """Trainings that are done: on disk, and by what they depend on.

    Args:
        path: A file of a JSON object a line.
        kind: The dataclass that says what a training depends on; its fields
            are in each line.
    """

    def __init__(self, path, kind):
        self.path = path
        self.by_run = {}
        if path.exists():
            for line in path.read_text().splitlines():
                result = json.loads(line)
                run = kind(
                    **{name: result[name] for name in kind.__annotations__}
                )
                self.by_run[run] = result

    def add(self, run, result):
        """Appends to the file at once: a stop loses one training at most."""
        self.by_run[run] = result
        with self.path.open("a") as file:
            file.write(json.dumps(result) + "\n")

    def values(self, runs, metric="accuracy"):
        """A figure of each run, as an array."""
        return np.array([self.by_run[run][metric] for run in runs])

    def rates(self, plan, cell):
        """The mean over the tuning trainings of a cell, by rate."""
        return {
            rate: float(self.values(runs, cell.metric).mean())
            for rate, runs in plan.tuning(cell).items()
        }

    def best_rate(self, plan, cell):
        """The rate that tuning chose."""
        means = self.rates(plan, cell)
        return max(means, key=means.get)


def progress_bar(console):
    """What is trained, how much of it is done, and for how long."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def train_all(train, runs, results, jobs, progress, title, tasks_per_child=200):
    """Trains what is missing, `jobs` at a time; `train` takes a run."""
    missing = [run for run in dict.fromkeys(runs) if run not in results.by_run]
    if not missing:
        return
    task = progress.add_task(title, total=len(missing))
    # Processes, for one TensorFlow each; new ones now and then, since
    # TensorFlow never frees a graph that it traced. (A pool that replaces its
    # workers by itself, `max_tasks_per_child`, can wait for ever: CPython's
    # issue 115634.)
    share = jobs * tasks_per_child
    for begin in range(0, len(missing), share):
        with ProcessPoolExecutor(
            jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=silence,
        ) as pool:
            futures = {
                pool.submit(train, run): run
                for run in missing[begin : begin + share]
            }
            try:
                for future in as_completed(futures):
                    results.add(futures[future], future.result())
                    progress.advance(task)
            except BaseException:
                # Else the pool would go on with all of them before it closes.
                for future in futures:
                    future.cancel()
                raise
