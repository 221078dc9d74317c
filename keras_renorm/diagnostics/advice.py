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


# The settings of the corrected gradient. On Keras's other backends it does not
# exist, and late freezing comes nearest.
_CORRECTED = (
    "`BatchRenormalization(gradient_momentum=0.9)` (TensorFlow; on other "
    "backends without that, and with `callbacks.FreezeStatistics()` and a "
    "learning rate that decays)"
)

FOUR_AND_MORE = Advice(
    "i.i.d. minibatches of four and more",
    "`BatchNormalization`; renormalization gains nothing, and may cost a "
    "point or two",
    "`BatchNormalization`; renormalization gains nothing",
    (("digits", "iid_4", "bn"), ("cluttered", "iid_4", "bn")),
)
TWO_OR_THREE = Advice(
    "i.i.d. minibatches of two or three images",
    f"{_CORRECTED}; on an easy task it gains nothing over `BatchNormalization`",
    "`BatchRenormalization(gradient_momentum=0.9)`",
    (("cluttered", "iid_2", "renorm_corrected"),),
)
ONE_IMAGE = Advice(
    "minibatches of one image",
    _CORRECTED,
    "`BatchRenormalization(gradient_momentum=0.9)`",
    (
        ("digits", "iid_1", "renorm_corrected"),
        ("cluttered", "iid_1", "renorm_corrected"),
    ),
)
FEW_VECTORS = Advice(
    "minibatches of one to three examples without spatial axes",
    "Keras's `GroupNormalization` or `LayerNormalization`: one example has no "
    "variance; `BatchRenormalization(gradient_momentum=0.9)` comes second",
    "neither: Keras's `GroupNormalization` or `LayerNormalization`",
    (("digits_dense", "iid_2", "group"),),
)
GROUPED = Advice(
    "minibatches that are not i.i.d. (one class, one user, one scene)",
    f"{_CORRECTED}; Adam with its defaults does as well as SGD; without "
    "spatial axes Keras's `GroupNormalization` is ahead",
    "`BatchRenormalization(gradient_momentum=0.9)`",
    (
        ("digits", "one_class", "renorm_corrected"),
        ("cluttered", "one_class", "renorm_corrected"),
        ("digits_dense", "one_class", "group"),
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
