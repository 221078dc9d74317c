"""Which trainings answer which question."""

from typing import NamedTuple

from benchmarks.quality.contenders import CONTENDERS
from benchmarks.quality.training import TUNING_SEED, Run

_SGD_RATES = (0.005, 0.015, 0.05, 0.15)
_ADAM_RATES = (0.0003, 0.001, 0.003, 0.01)
RATES = {
    "sgd": _SGD_RATES,
    "sgd_constant": _SGD_RATES,
    "sgd_rest_0.1": _SGD_RATES,
    "adam": _ADAM_RATES,
    "adam_rest_10": _ADAM_RATES,
    "adam_epsilon_0.1": (0.01, 0.03, 0.1, 0.3),
}
# With weights that know something already, larger ones forget it.
FINE_TUNING_RATES = (0.00015, 0.0005, 0.0015, 0.005)
_TIMES_TUNED = {
    "one_class": 2,
    "two_classes": 3,
    **{f"iid_{size}": 3 for size in (128, 64, 32, 16, 8, 4)},
}
_SLOW_TASKS = ("cluttered_residual", "segments")


class Cell(NamedTuple):
    """A contender in a regime: a row and a column of a table.

    `metric` is what is compared, and what a rate is chosen by: "accuracy", or
    "recalibrated" for that after `keras_renorm.recalibrate`. `length` is the
    length of its trainings, over that of the plan.
    """

    task: str
    regime: str
    contender: str
    optimizer: str = "sgd"
    metric: str = "accuracy"
    length: float = 1.0

    @property
    def rates(self):
        """The rates that are tried."""
        if self.regime.startswith("fine_tuning"):
            return FINE_TUNING_RATES
        return RATES[self.optimizer]

    @property
    def label(self):
        """What tables call the contender."""
        label = CONTENDERS[self.contender].label
        return label if self.metric == "accuracy" else f"{label}, {self.metric}"


class Plan(NamedTuple):
    """How much is trained.

    Attributes:
        seeds: Evaluation trainings of a cell, seeds 0, 1, ...; half as many
            of networks that take several times as long as others.
        tuning_seeds: Trainings for each cell and rate before that, of other
            seeds, on another split of the data. Three times as many where
            rates differ by less than seeds do (two classes, and i.i.d.
            minibatches of 4 and more), twice as many where seeds differ most
            (one class).
        steps: Steps of a training; fine-tuning takes a sixth.
    """

    seeds: int
    tuning_seeds: int
    steps: int

    def run(self, cell, rate, seed):
        """One training of a cell."""
        steps = round(self.steps * cell.length)
        if cell.regime.startswith("fine_tuning"):
            steps //= 6
        return Run(
            cell.task,
            cell.regime,
            cell.contender,
            cell.optimizer,
            rate,
            steps,
            seed,
        )

    def tuning(self, cell):
        """The trainings that choose the rate of a cell."""
        count = self.tuning_seeds * _TIMES_TUNED.get(cell.regime, 1)
        return {
            rate: [
                self.run(cell, rate, TUNING_SEED + index)
                for index in range(count)
            ]
            for rate in cell.rates
        }

    def evaluation(self, cell, rate):
        """The trainings that count."""
        seeds = self.seeds
        if cell.task in _SLOW_TASKS:
            seeds = -(-seeds // 2)
        return [self.run(cell, rate, seed) for seed in range(seeds)]


class Experiment(NamedTuple):
    """A question and the cells that answer it.

    `tuned_as` names the contender whose rate all cells take and with which
    they are compared, seed by seed, so that one thing is changed at a time;
    `None` tunes each for itself. `columns` is what a table has a column for:
    a field of `Cell`.
    """

    name: str
    question: str
    cells: tuple[Cell, ...]
    tuned_as: str | None = None
    columns: str = "regime"

    def tuned_cell(self, cell):
        """The cell whose tuning gives this one its rate."""
        if self.tuned_as is None:
            return cell
        return cell._replace(contender=self.tuned_as, metric="accuracy")


# Regimes and contenders are many, and a training takes seconds: all meet
# where much is at stake.
_FEW = ("bn", "renorm", "renorm_corrected", "gated", "keras_renorm", "group")
_SOME = (*_FEW, "renorm_frozen_late")
_MAIN = (*_SOME, "layer")
_ALL = (
    *_MAIN,
    "bn_frozen_late",
    "renorm_momentum_0.95",
    "renorm_crossq",
    "renorm_gn",
    "renorm_limits_10.0_25.0",
)
_CONTENDERS = {
    **dict.fromkeys(("one_class", "iid_2"), _ALL),
    **dict.fromkeys(("iid_4", "iid_1"), (*_MAIN, "bn_frozen_late")),
    "two_classes": _MAIN,
    "sorted": _FEW,
    **{f"iid_{size}": _FEW for size in (3, 8, 16, 32, 64, 128)},
}
_FEWER_CONTENDERS = {
    regime: (*_SOME, "bn_frozen_late")
    if regime in ("one_class", "iid_4", "iid_2", "iid_1")
    else _FEW
    for regime in _CONTENDERS
}
# Where recalibration may matter: statistics are far from the population's.
_RECALIBRATED = (
    "one_class",
    "iid_2",
    "iid_1",
    "fine_tuning_4",
    "fine_tuning_2",
)


def _cells(task, regime, contenders):
    """Two contenders twice: as they are, and recalibrated after training."""
    return tuple(
        Cell(task, regime, contender, metric=metric)
        for contender in contenders
        for metric in ("accuracy", "recalibrated")
        if metric == "accuracy"
        or (contender in ("bn", "renorm") and regime in _RECALIBRATED)
    )


def _regimes(task, contenders):
    return Experiment(
        f"regimes_{task}",
        f"Does it help, and where? ({task})",
        tuple(
            cell
            for regime, names in contenders.items()
            for cell in _cells(task, regime, names)
        ),
    )


def _fine_tuning(task, regimes, contenders):
    return Experiment(
        f"fine_tuning_{task}",
        f"Fine-tuning to another camera, with 200 images ({task})",
        tuple(
            cell
            for regime in regimes
            for cell in _cells(task, regime, contenders)
        ),
    )


_QUESTIONS = {
    "moments": (
        "Which moment should be averaged, and debiased?",
        ("renorm_variance", "renorm_unbiased", "renorm_stddev"),
    ),
    "momentum": ("Which momentum?", ("renorm_momentum",)),
    "limits": (
        "How far should the limits open, and when?",
        ("renorm_open", "renorm_ramp", "renorm_limits", "renorm_adaptive"),
    ),
}


def _ablation(name, task, regimes=("one_class", "iid_2"), quick=False):
    question, prefixes = _QUESTIONS[name]
    variants = [
        contender for contender in CONTENDERS if contender.startswith(prefixes)
    ]
    if quick:
        regimes, variants = regimes[:1], variants[:1]
    return Experiment(
        f"{name}_{task}",
        f"{question} ({task})",
        tuple(
            Cell(task, regime, contender)
            for regime in regimes
            for contender in ("renorm", *variants)
        ),
        tuned_as="renorm",
    )


def _lengths(task, quick=False):
    contenders = (
        *("renorm", "renorm_steps_190", "renorm_steps_500"),
        *("renorm_steps_800", "renorm_steps_1000"),
        *("renorm_steps_1500", "renorm_momentum_0.95"),
    )
    lengths = (0.5, 1.0) if quick else (0.25, 0.5, 1.0, 2.0)
    return Experiment(
        f"lengths_{task}",
        "Should ramp and momentum scale with the length of the run? "
        f"({task}, one class a minibatch)",
        tuple(
            Cell(task, "one_class", contender, length=length)
            for length in lengths
            for contender in contenders[: 2 if quick else None]
        ),
        tuned_as="renorm",
        columns="length",
    )


def _optimizers(task, quick=False):
    contenders = (
        *("renorm", "renorm_corrected", "gated", "group"),
        *("renorm_frozen_late", "bn"),
    )
    if quick:
        contenders = ("renorm",)
    return Experiment(
        f"optimizers_{task}",
        f"Does the optimizer change the order? ({task}, one class a minibatch)",
        tuple(
            Cell(task, "one_class", contender, optimizer)
            for contender in contenders
            for optimizer in RATES
            if optimizer in ("sgd", "adam")
            or (
                contender in ("renorm", "group")
                and optimizer != "sgd_constant"
                and not quick
            )
        ),
        columns="optimizer",
    )


def _deep():
    """Networks of more layers, where errors of one are the next one's."""
    return [
        Experiment(
            "regimes_cluttered_residual",
            "Does it help a residual network of 15 convolutions? (cluttered)",
            tuple(
                Cell("cluttered_residual", regime, contender, length=0.5)
                for regime in ("one_class", "iid_2")
                for contender in _FEW
            ),
        ),
        Experiment(
            "segments",
            "Segmentation with minibatches of two, intersection over union",
            tuple(
                Cell("segments", "iid_2", contender, optimizer, length=0.5)
                for contender in _FEW
                for optimizer in ("sgd", "sgd_constant")
            ),
            columns="optimizer",
        ),
    ]


def experiments(tasks, quick):
    """All of them; a few cells of the first task's where it is quick.

    The first task has more contenders; moments and momentum are asked on
    every task, since no data set answers for another, and moments where they
    differ most, with two elements a channel; limits on the last task, which
    leaves them most room.
    """
    first, *others = tasks
    if quick:
        return [
            _regimes(
                first, dict.fromkeys(("one_class", "iid_2"), ("bn", "renorm"))
            ),
            _fine_tuning(
                first, ("fine_tuning_2",), ("bn", "bn_adapted_frozen")
            ),
            *(_ablation(name, first, quick=True) for name in _QUESTIONS),
            _lengths(first, quick=True),
            _optimizers(first, quick=True),
        ]
    dense = [f"{task}_dense" for task in tasks if task == "digits"]
    return [
        _regimes(first, _CONTENDERS),
        _fine_tuning(
            first,
            ("fine_tuning_4", "fine_tuning_2"),
            (
                *("bn", "bn_frozen", "bn_adapted_frozen"),
                *("gated", "renorm", "renorm_corrected", "renorm_adapted"),
                *("renorm_corrected_adapted", "renorm_open"),
                *("renorm_momentum_0.95", "keras_renorm", "group"),
            ),
        ),
        _optimizers(first),
        *(
            _ablation(name, task)
            for name in ("moments", "momentum")
            for task in tasks
        ),
        *(
            experiment
            for task in dense
            for experiment in (
                _regimes(
                    task,
                    {
                        "one_class": _FEW,
                        **dict.fromkeys(("iid_4", "iid_2"), _SOME),
                    },
                ),
                _ablation("moments", task, ("one_class", "iid_4", "iid_2")),
            )
        ),
        _lengths(first),
        _ablation("limits", tasks[-1]),
        *(_regimes(task, _FEWER_CONTENDERS) for task in others),
        *(_deep() if "cluttered" in tasks else []),
    ]
