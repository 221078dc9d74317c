"""Which normalization for which minibatches: one table.

Remedies of reports are its rows. `benchmarks/documents.py` writes them into
README and docs/which_layer.md. What they rest on is `evidence`; a test holds
each row to the results of `benchmarks/quality`.
"""

from typing import NamedTuple


class Advice(NamedTuple):
    """One row.

    Attributes:
        where: What minibatches hold.
        take: What to do then.
        brief: The same in few words.
        evidence: Task, regime and contender of `benchmarks/quality`: none of
            batch, group and batch renormalization, frozen late or not, was
            better there by more than the contender's standard deviation.
    """

    where: str
    take: str
    brief: str
    evidence: tuple[tuple[str, str, str], ...]


FOUR_AND_MORE = Advice(
    "i.i.d. minibatches of four and more",
    "`BatchNormalization`; renormalization gains nothing, and may cost a "
    "point or two",
    "`BatchNormalization`; renormalization gains nothing",
    (("digits", "iid_4", "bn"), ("cluttered", "iid_4", "bn")),
)
TWO_OR_THREE = Advice(
    "i.i.d. minibatches of two or three images",
    "`BatchNormalization` with `callbacks.FreezeStatistics()` and a learning "
    "rate that decays; renormalization gains nothing",
    "`BatchNormalization` with `FreezeStatistics()`",
    (
        ("digits", "iid_2", "bn_frozen_late"),
        ("cluttered", "iid_2", "bn_frozen_late"),
    ),
)
ONE_IMAGE = Advice(
    "minibatches of one image",
    "`BatchRenormalization` with `RenormScheduler()`, `FreezeStatistics()`, a "
    "learning rate that decays, and SGD or Adam with `epsilon=0.1`; try "
    "Keras's `GroupNormalization` too",
    "`BatchRenormalization` with `FreezeStatistics()`, or Keras's "
    "`GroupNormalization`",
    (
        ("digits", "iid_1", "renorm_frozen_late"),
        ("cluttered", "iid_1", "group"),
    ),
)
FEW_VECTORS = Advice(
    "minibatches of one to three examples without spatial axes",
    "Keras's `GroupNormalization` or `LayerNormalization`: one example has no "
    "variance; `BatchRenormalization` and `RenormScheduler()` come second",
    "neither: Keras's `GroupNormalization` or `LayerNormalization`",
    (("digits_dense", "iid_2", "group"),),
)
GROUPED = Advice(
    "minibatches that are not i.i.d. (one class, one user, one scene)",
    "`BatchRenormalization` with `RenormScheduler()`, `FreezeStatistics()`, a "
    "learning rate that decays, and SGD or Adam with `epsilon=0.1`; "
    "`momentum=0.95` if the run has less than a thousand steps",
    "`BatchRenormalization` with `FreezeStatistics()`",
    (
        ("digits", "one_class", "renorm_frozen_late"),
        ("cluttered", "one_class", "renorm_frozen_late"),
    ),
)
ROWS = (FOUR_AND_MORE, TWO_OR_THREE, ONE_IMAGE, FEW_VECTORS, GROUPED)


def advice_for(examples: float, elements: float) -> Advice:
    """The row for random draws.

    Args:
        examples: Examples a minibatch.
        elements: Elements a channel of it: as many, where examples have no
            axis but that of channels.
    """
    if examples >= 4:
        return FOUR_AND_MORE
    if elements <= examples:
        return FEW_VECTORS
    return ONE_IMAGE if examples < 2 else TWO_OR_THREE
