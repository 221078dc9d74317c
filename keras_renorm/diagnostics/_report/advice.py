"""Which normalization for which minibatches: one layer, and where it is behind.

Remedies of reports are rows of it. `benchmarks/documents.py` writes them into
README. What they rest on is `evidence`; a test holds each row to the results of
`benchmarks/quality`.
"""

from typing import NamedTuple


class Advice(NamedTuple):
    """One row.

    Attributes:
        where: What minibatches hold.
        take: What to do then.
        evidence: Task, regime and contender of `benchmarks/quality`: no other
            normalization was better there by more than the contender's
            standard deviation.
    """

    where: str
    take: str
    evidence: tuple[tuple[str, str, str], ...] = ()


# Fewer random draws than this are few.
FEW = 4

ANY = Advice(
    "minibatches of any kind",
    "`BatchRenormalization()`",
    tuple(
        (task, regime, "gated")
        for task in ("digits", "cluttered")
        for regime in (
            *("one_class", "two_classes"),
            *(f"iid_{size}" for size in (1, 2, 3, 4, 8, 16, 32, 64, 128)),
        )
    ),
)
WITHOUT_AXES = Advice(
    "minibatches of one to three examples, or of one class, without spatial "
    "axes",
    "Keras's `GroupNormalization` or `LayerNormalization` are ahead: one "
    "example has no variance; `BatchRenormalization()` comes second",
    (
        ("digits_dense", "iid_2", "group"),
        ("digits_dense", "one_class", "group"),
    ),
)
SORTED = Advice(
    "data sorted by class",
    "shuffle: no normalization fixes that",
)
ROWS = (ANY, WITHOUT_AXES, SORTED)


def advice_for(
    examples: float, elements: float, is_grouped: bool = False
) -> Advice:
    """The row for batches that are small, or whose examples are alike.

    Args:
        examples: Examples a minibatch.
        elements: Elements a channel of it: as many, where examples have no
            axis but that of channels.
        is_grouped: Whether examples of a batch are more alike than random
            ones.
    """
    if elements <= examples and (examples < FEW or is_grouped):
        return WITHOUT_AXES
    return ANY
