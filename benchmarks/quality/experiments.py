"""Which trainings answer which question."""

from typing import NamedTuple

from contenders import CONTENDERS
from training import TUNING_SEED, Run

RATES = {
    "sgd": (0.005, 0.015, 0.05, 0.15),
    "adam": (0.0003, 0.001, 0.003, 0.01),
}


# With weights that know something already, larger ones forget it.
FINE_TUNING_RATES = (0.00015, 0.0005, 0.0015, 0.005)


class Cell(NamedTuple):
    """A contender in a regime: a row and a column of a table.

    `metric` is what is compared, and what a rate is chosen by: "accuracy", or
    "recalibrated" for that after `keras_renorm.recalibrate`.
    """

    task: str
    regime: str
    contender: str
    optimizer: str = "sgd"
    metric: str = "accuracy"

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
        seeds: Evaluation trainings of a cell, seeds 0, 1, ...
        tuning_seeds: Trainings for each cell and rate before that, of other
            seeds, on another split of the data; twice as many where a
            minibatch is not i.i.d., since seeds differ more there.
        steps: Steps of a training; fine-tuning takes a sixth.
    """

    seeds: int
    tuning_seeds: int
    steps: int

    def run(self, cell, rate, seed):
        """One training of a cell."""
        fine_tuning = cell.regime.startswith("fine_tuning")
        return Run(
            cell.task,
            cell.regime,
            cell.contender,
            cell.optimizer,
            rate,
            self.steps // 6 if fine_tuning else self.steps,
            seed,
        )

    def tuning(self, cell):
        """The trainings that choose the rate of a cell."""
        count = self.tuning_seeds * (2 if cell.regime == "one_class" else 1)
        return {
            rate: [
                self.run(cell, rate, TUNING_SEED + index)
                for index in range(count)
            ]
            for rate in cell.rates
        }

    def evaluation(self, cell, rate):
        """The trainings that count."""
        return [self.run(cell, rate, seed) for seed in range(self.seeds)]


class Experiment(NamedTuple):
    """A question and the cells that answer it.

    `tuned_as` names the contender whose rate all cells take and with which
    they are compared, seed by seed, so that one thing is changed at a time;
    `None` tunes each for itself.
    """

    name: str
    question: str
    cells: tuple[Cell, ...]
    tuned_as: str | None = None

    def tuned_cell(self, cell):
        """The cell whose tuning gives this one its rate."""
        if self.tuned_as is None:
            return cell
        return cell._replace(contender=self.tuned_as, metric="accuracy")


# Regimes and contenders are many, and a training takes seconds: all meet
# where much is at stake.
_FEW = ("bn", "renorm", "group")
_SOME = (*_FEW, "keras_renorm")
_MAIN = (*_SOME, "renorm_frozen_late", "layer")
_ALL = (
    *_MAIN,
    "bn_frozen_late",
    "renorm_momentum_0.95",
    "renorm_crossq",
    "renorm_gn",
    "renorm_wide",
)
_CONTENDERS = {
    **dict.fromkeys(("one_class", "iid_2"), _ALL),
    "iid_4": (*_MAIN, "bn_frozen_late"),
    **dict.fromkeys(("two_classes", "iid_1"), _MAIN),
    "sorted": _SOME,
    **dict.fromkeys(("iid_8", "iid_16", "iid_32"), _FEW),
}
# Where recalibration may matter: statistics are far from the population's.
_RECALIBRATED = ("one_class", "iid_2", "iid_1", "fine_tuning_2")


def _cells(task, regime, contenders):
    """Two contenders twice: as they are, and recalibrated after training."""
    return tuple(
        Cell(task, regime, contender, metric=metric)
        for contender in contenders
        for metric in ("accuracy", "recalibrated")
        if metric == "accuracy"
        or (contender in ("bn", "renorm") and regime in _RECALIBRATED)
    )


def _regimes(task, quick):
    if quick:
        contenders = dict.fromkeys(("one_class", "iid_2"), ("bn", "renorm"))
    elif task == "cluttered":
        contenders = dict.fromkeys(("one_class", "iid_16"), _FEW)
    else:
        contenders = _CONTENDERS
    return Experiment(
        f"regimes_{task}",
        f"Does it help, and where? ({task})",
        tuple(
            cell
            for regime, names in contenders.items()
            for cell in _cells(task, regime, names)
        ),
    )


def _fine_tuning(task, quick):
    contenders = ("bn", "bn_frozen", "renorm", "renorm_open")
    if not quick:
        contenders += ("renorm_momentum_0.95", "keras_renorm", "group")
    return Experiment(
        f"fine_tuning_{task}",
        f"Fine-tuning to another camera, with 200 images ({task})",
        _cells(task, "fine_tuning_2", contenders),
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


def _ablation(name, task, quick):
    question, prefixes = _QUESTIONS[name]
    variants = [
        contender for contender in CONTENDERS if contender.startswith(prefixes)
    ]
    regimes = ("one_class", "iid_2")
    if quick:
        regimes, variants = regimes[:1], variants[:1]
    cells = tuple(
        Cell(task, regime, contender)
        for regime in regimes
        for contender in ("renorm", *variants)
    )
    return Experiment(name, question, cells, tuned_as="renorm")


def _optimizers(task, quick):
    contenders = ("bn", "renorm", "renorm_frozen_late", "group")
    if quick:
        contenders = ("renorm",)
    return Experiment(
        "optimizers",
        "Does the optimizer change the order? (one class a minibatch)",
        tuple(
            Cell(task, "one_class", contender, optimizer)
            for contender in contenders
            for optimizer in ("sgd", "adam")
        ),
    )


def experiments(tasks, quick):
    """All of them; a few cells of each where it is quick.

    The first task answers all questions, the others only whether it helps.
    """
    return [
        _regimes(tasks[0], quick),
        *(_ablation(name, tasks[0], quick) for name in _QUESTIONS),
        _optimizers(tasks[0], quick),
        _fine_tuning(tasks[0], quick),
        *(_regimes(task, quick) for task in tasks[1:]),
    ]
