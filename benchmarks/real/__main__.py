"""Real jobs on real data, beside what people use there.

    python -m benchmarks.real --quick           # one setting of each job, short
    python -m benchmarks.real --jobs series     # one job, whole
    python -m benchmarks.real                   # all of them: hours

Every training is written into `JOB.jsonl` of the output folder at once, and
what is there is not trained again: a run that was stopped goes on where it
ended. Then a table (`JOB.md`), its figures (`JOB.json`) and a picture.
"""

import argparse
import signal
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:  # run as a folder: `python benchmarks/real`
    sys.path[0] = str(Path(__file__).parents[2])
from benchmarks.quality.quiet import use_one_thread

use_one_thread()

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from rich.console import Console
from rich.markdown import Markdown

from benchmarks import timing
from benchmarks.quality.workers import Results, progress_bar, train_all
from benchmarks.real import jobs, report

RESULTS = Path(__file__).parents[1] / "results" / "real"


def parse_arguments(values=None):
    """The arguments; `plans` is what they come to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--jobs", nargs="+", choices=jobs.names(), default=jobs.names()
    )
    parser.add_argument(
        "--settings", nargs="+", metavar="NAME", help="of one job: train these"
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="trainings side by side (1)"
    )
    parser.add_argument("--seeds", type=int, help="trainings that count")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="short trainings, one setting and seed: shows that it works",
    )
    parser.add_argument(
        "--output", type=Path, help="a folder (benchmarks/results/real)"
    )
    parser.add_argument(
        "--no-training",
        action="store_true",
        help="report what has been trained, and leave out what has not",
    )
    args = parser.parse_args(values)
    for name in ("workers", "seeds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1. Received: {value}.")
    if args.output is None:
        args.output = Path("output") / "real" if args.quick else RESULTS
    args.plans = [
        jobs.Plan(name, jobs.load(name), args.quick, args.seeds, args.settings)
        for name in args.jobs
    ]
    known = [name for plan in args.plans for name in plan.job.SETTINGS]
    for name in args.settings or ():
        if name not in known:
            parser.error(
                f"--settings must be among {', '.join(known)}. "
                f"Received: {name}."
            )
    for plan in args.plans:
        missing = jobs.missing_packages(plan.job)
        if missing and not args.no_training:
            parser.error(
                f"--jobs {plan.name} needs packages that are not installed: "
                f"pip install {' '.join(missing)}"
            )
    return args


def train_job(plan, args, results, progress):
    """Finds the rate of each cell, then trains what counts."""
    stages = {
        f"{plan.name}: rates": lambda: [
            run
            for cell in plan.cells
            for runs in plan.tuning(cell).values()
            for run in runs
        ],
        plan.name: lambda: [
            run
            for cell in plan.cells
            for run in plan.evaluation(cell, plan.best_rate(cell, results))
        ],
    }
    for title, runs in stages.items():
        train_all(
            jobs.train,
            runs(),
            results,
            args.workers,
            progress,
            title,
            # Each training may trace graphs, which TensorFlow never frees.
            tasks_per_child=20,
        )


def write(plan, output, results, console):
    """The table of all settings, its figures and a picture."""
    plan = replace(plan, settings=None)
    summary = jobs.summarize(plan, results)
    if not summary["cells"]:
        console.print(f"{plan.name}: nothing is trained yet")
        return
    timing.write(output / f"{plan.name}.json", summary)
    text = "\n".join(
        [f"# {plan.job.TITLE}", "", *report.markdown(summary, True), ""]
    )
    (output / f"{plan.name}.md").write_text(text, encoding="utf-8")
    console.print(Markdown(text))
    figure = report.picture(plt, summary)
    figure.savefig(output / f"{plan.name}.png", dpi=110)
    plt.close(figure)
    if hasattr(plan.job, "draw"):
        plan.job.draw(output)


def main():
    """Trains, then reports."""
    args = parse_arguments()
    # As an interrupt: else the workers would outlive this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console = Console()
    args.output.mkdir(parents=True, exist_ok=True)
    for plan in args.plans:
        results = Results(args.output / f"{plan.name}.jsonl", jobs.Run)
        if not args.no_training:
            with progress_bar(console) as progress:
                train_job(plan, args, results, progress)
        write(plan, args.output, results, console)
    console.print(f"Tables, JSON and pictures: {args.output}")


if __name__ == "__main__":
    main()
