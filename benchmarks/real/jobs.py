"""Jobs: which there are, what a training of one depends on, and its figures."""

import importlib
import time
from dataclasses import asdict, dataclass
from importlib import metadata

import numpy as np

from benchmarks import real, timing
from benchmarks.real import report

# Rates are chosen with other seeds than those that count.
TUNING_SEED = 1_000


@dataclass(frozen=True)
class Run:
    """All that a training depends on."""

    job: str
    setting: str
    contender: str
    rate: float
    seed: int
    steps: int


def names():
    """Of all jobs."""
    return report.job_names(real.__path__)


def load(name):
    """The module of a job."""
    return importlib.import_module(f"benchmarks.real.{name}")


def missing_packages(job):
    """Those of `NEEDS` that are not installed."""

    def is_missing(name):
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            return True
        return False

    return [name for name in job.NEEDS.split() if is_missing(name)]


@dataclass(frozen=True)
class Plan:
    """Which trainings a job has, whole or quick."""

    name: str
    job: object
    is_quick: bool = False
    seeds: int | None = None
    settings: tuple[str, ...] | None = None

    @property
    def cells(self):
        """Pairs of a setting and a contender."""
        settings = [
            name
            for name in self.job.SETTINGS
            if self.settings is None or name in self.settings
        ]
        return [
            (setting, contender)
            for setting in (settings[:1] if self.is_quick else settings)
            for contender in self.job.CONTENDERS
        ]

    def _runs(self, cell, rate, first_seed, count):
        steps = self.job.QUICK_STEPS if self.is_quick else self.job.STEPS
        return [
            Run(self.name, *cell, rate, first_seed + at, steps)
            for at in range(count)
        ]

    def tuning(self, cell):
        """Rate -> trainings, where there is a rate to choose."""
        rates = self.job.RATES
        if isinstance(rates, dict):
            rates = rates[cell[1]]
        rates = rates[:1] if self.is_quick else rates
        count = getattr(self.job, "TUNING_SEEDS", 1)
        return {
            rate: self._runs(
                cell, rate, TUNING_SEED, count if len(rates) > 1 else 0
            )
            for rate in rates
        }

    def evaluation(self, cell, rate):
        """The trainings that count."""
        count = 1 if self.is_quick else self.seeds or self.job.SEEDS
        return self._runs(cell, rate, 0, count)

    def best_rate(self, cell, results):
        """The rate with the best first measure; `None` before all are there."""
        tuning = self.tuning(cell)
        if len(tuning) == 1:
            return next(iter(tuning))
        if not all(
            run in results.by_run for runs in tuning.values() for run in runs
        ):
            return None
        measure, (_, best) = next(iter(self.job.MEASURES.items()))
        sign = 1 if best == "high" else -1

        def score(runs):
            mean = sign * results.values(runs, measure).mean()
            return mean if np.isfinite(mean) else -np.inf

        return max(tuning, key=lambda rate: score(tuning[rate]))


def train(run):
    """One training: its figures, how long it took, and where."""
    job = load(run.job)
    job.STEPS = run.steps
    start = time.perf_counter()
    figures = job.train(
        run.setting, run.contender, run.rate, run.seed, run.seed >= TUNING_SEED
    )
    return {
        **asdict(run),
        **figures,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": _machine(job),
    }


def _machine(job):
    """Processor and versions."""
    found = timing.machine()
    packages = ("keras", "tensorflow", "jax", "torch")
    versions = [f"{name} {found[name]}" for name in packages if name in found]
    versions += [
        f"{name} {metadata.version(name)}" for name in job.NEEDS.split()
    ]
    return ", ".join([found["processor"], *versions])


def summarize(plan, results):
    """What the trainings came to, as far as all of a cell are there."""
    cells, machines = [], set()
    for cell in plan.cells:
        rate = plan.best_rate(cell, results)
        runs = plan.evaluation(cell, rate)
        if rate is None or not all(run in results.by_run for run in runs):
            continue
        machines |= {results.by_run[run]["machine"] for run in runs}
        found = {name: results.values(runs, name) for name in plan.job.MEASURES}
        cells.append(
            {
                "setting": cell[0],
                "contender": cell[1],
                "rate": rate,
                "seeds": len(runs),
                "values": {k: v.tolist() for k, v in found.items()},
                "mean": {k: float(v.mean()) for k, v in found.items()},
                # A sample of seeds: divisor n - 1.
                "spread": {
                    k: float(v.std(ddof=1)) if len(v) > 1 else 0.0
                    for k, v in found.items()
                },
            }
        )
    return {
        "title": plan.job.TITLE,
        "measures": plan.job.MEASURES,
        "settings": plan.job.SETTINGS,
        "contenders": plan.job.CONTENDERS,
        "machines": sorted(machines),
        "cells": cells,
    }
