"""Whether renormalization helps, and with which settings.

Trains the same networks over many seeds, in regimes and with normalizations
that `experiments.py` lists, and writes tables and JSON.

    python -m benchmarks.quality --quick    # about three minutes on two cores
    python -m benchmarks.quality            # hours; results/ has what came out

Every training is written into `runs.jsonl` of the output folder, and what is
there is not trained again: a run that was stopped goes on where it ended. One
training by itself, to repeat its figure, by the name that `summary.json` gives:

    python -m benchmarks.quality --run digits/one_class/renorm/sgd/0.015/3000/0
"""

import json
import signal
import sys
from pathlib import Path

if not __package__:  # run as a folder: `python benchmarks/quality`
    sys.path[0] = str(Path(__file__).parents[2])
from benchmarks.quality.quiet import use_one_thread

use_one_thread()

from rich.console import Console

from benchmarks.quality import report
from benchmarks.quality.command import parse_arguments
from benchmarks.quality.training import Run, train
from benchmarks.quality.workers import Results, progress_bar, train_all


def main():
    """Trains, then reports."""
    args = parse_arguments(description=__doc__)
    if args.run is not None:
        print(json.dumps(train(args.run), indent=1))
        return
    # As an interrupt: else the workers would outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    results = Results(args.output / "runs.jsonl", Run)
    rates = {}
    with progress_bar(console) as progress:
        if args.no_training:
            args.experiments = trained(args.experiments, args.plan, results)
        for experiment in args.experiments:
            train_experiment(experiment, args, results, rates, progress)
    report.write(
        args.output, console, args.plan, args.experiments, rates, results
    )


def trained(experiments, plan, results):
    """Experiments with the cells of which nothing is missing."""

    def is_trained(experiment, cell):
        tuned_cell = experiment.tuned_cell(cell)
        tuning = plan.tuning(tuned_cell).values()
        if not all(run in results.by_run for runs in tuning for run in runs):
            return False
        rate = results.best_rate(plan, tuned_cell)
        runs = plan.evaluation(cell, rate)
        return all(run in results.by_run for run in runs)

    found = [
        each._replace(
            cells=tuple(cell for cell in each.cells if is_trained(each, cell))
        )
        for each in experiments
    ]
    return [each for each in found if each.cells]


def train_experiment(experiment, args, results, rates, progress):
    """Finds the rate of each cell, then trains what counts."""
    tuned = sorted({experiment.tuned_cell(cell) for cell in experiment.cells})
    train_all(
        train,
        [
            run
            for cell in tuned
            for runs in args.plan.tuning(cell).values()
            for run in runs
        ],
        results,
        args.jobs,
        progress,
        f"{experiment.name}: rates",
    )
    for cell in experiment.cells:
        tuned_cell = experiment.tuned_cell(cell)
        rates[experiment.name, cell] = results.best_rate(args.plan, tuned_cell)
    train_all(
        train,
        [
            run
            for cell in experiment.cells
            for run in args.plan.evaluation(cell, rates[experiment.name, cell])
        ],
        results,
        args.jobs,
        progress,
        experiment.name,
    )


if __name__ == "__main__":
    main()
