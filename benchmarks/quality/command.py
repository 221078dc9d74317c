"""The command line."""

import argparse
import os
from pathlib import Path

from benchmarks.quality import batches, experiments, tasks
from benchmarks.quality.contenders import CONTENDERS
from benchmarks.quality.experiments import Plan
from benchmarks.quality.training import EPOCHS, Run

FULL = Plan(seeds=10, tuning_seeds=1, steps=3_000)
QUICK = Plan(seeds=2, tuning_seeds=1, steps=300)
# Fine-tuning takes a sixth of the steps, and has as many epochs.
FEWEST_STEPS = 6 * EPOCHS


def parse_arguments(values=None, description=None):
    """The arguments; `plan` and `experiments` are what they come to."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="short trainings of few contenders: shows that it works",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=tasks.NAMES,
        help="default: digits and cluttered, with --quick digits; cifar10 is "
        "downloaded, and wants a GPU and more --steps; --quick takes one",
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="experiments by name"
    )
    parser.add_argument(
        "--seeds", type=int, help="trainings that count (10; quick: 2)"
    )
    parser.add_argument(
        "--tuning-seeds", type=int, help="trainings for each rate (1)"
    )
    parser.add_argument(
        "--steps", type=int, help="of a training (3000; quick: 300)"
    )
    parser.add_argument(
        "--jobs", type=int, default=_cores(), help="side by side (cores)"
    )
    parser.add_argument(
        "--output", type=Path, help="a folder (output/quality/full or quick)"
    )
    parser.add_argument(
        "--no-training",
        action="store_true",
        help="report what has been trained, and leave out what has not",
    )
    parser.add_argument(
        "--run",
        metavar="RUN",
        help="one training by its name: task/regime/contender/optimizer/"
        "rate/steps/seed; prints its figures",
    )
    args = parser.parse_args(values)
    if args.run is not None:
        args.run = _parse_run(parser, args.run)
    if args.output is None:
        folder = "quick" if args.quick else "full"
        args.output = Path("output") / "quality" / folder
    if args.tasks is None:
        args.tasks = ["digits"] if args.quick else ["digits", "cluttered"]
    if args.quick and len(args.tasks) > 1:
        parser.error(
            "--tasks must be a single one with --quick. Received: "
            f"{' '.join(args.tasks)}."
        )
    args.plan = QUICK if args.quick else FULL
    for name in (*Plan._fields, "jobs"):
        value = getattr(args, name)
        least = FEWEST_STEPS if name == "steps" else 1
        if value is None:
            continue
        if value < least:
            parser.error(
                f"--{name.replace('_', '-')} must be at least {least}. "
                f"Received: {value}."
            )
        if name != "jobs":
            args.plan = args.plan._replace(**{name: value})
    found = experiments.experiments(args.tasks, args.quick)
    names = [experiment.name for experiment in found]
    for name in args.only or ():
        _check_name(parser, "--only", name, names)
    args.experiments = [
        experiment
        for experiment in found
        if args.only is None or experiment.name in args.only
    ]
    return args


def _cores():
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _check_name(parser, what, name, names):
    if name not in names:
        parser.error(
            f"{what} must be among {', '.join(names)}. Received: {name}."
        )


def _parse_run(parser, text):
    names = list(Run.__annotations__)
    parts = text.split("/")
    try:
        *words, rate, steps, seed = parts
        run = Run(*words, float(rate), int(steps), int(seed))
    except (TypeError, ValueError):
        parser.error(f"--run must be {'/'.join(names)}. Received: {text}.")
    for name, known in (
        ("task", tasks.NAMES),
        ("regime", batches.REGIMES),
        ("contender", CONTENDERS),
        ("optimizer", experiments.RATES),
    ):
        _check_name(parser, f"--run: {name}", getattr(run, name), known)
    if run.steps < EPOCHS:
        parser.error(
            f"--run: steps must be at least {EPOCHS}. Received: {run.steps}."
        )
    return run
