"""Which examples share a minibatch: the regimes."""

import numpy as np

REGIMES = {
    **{f"iid_{size}": size for size in (128, 64, 32, 16, 8, 4, 3, 2, 1)},
    "one_class": 16,
    "two_classes": 16,
    "sorted": 16,
    **{f"fine_tuning_{size}": size for size in (4, 2)},
}


def draw(regime, labels, steps, rng):
    """Rows of the training data, shape `(steps, batch size)`.

    `iid_N` and `fine_tuning_N` draw from all of it; `one_class` and
    `two_classes` draw a class (or two, of eight examples each) and the
    minibatch from that; `sorted` goes through the data by class, class 0
    first, again and again, shuffled within a class.
    """
    if regime not in REGIMES:
        raise ValueError(
            f"`regime` must be among {', '.join(REGIMES)}. Received: "
            f"regime={regime!r}."
        )
    size = REGIMES[regime]
    if regime.startswith(("iid", "fine_tuning")):
        return rng.integers(len(labels), size=(steps, size))
    classes = np.unique(labels)
    rows_of = {label: np.flatnonzero(labels == label) for label in classes}
    if regime == "sorted":
        epochs = -(-steps * size // len(labels))
        order = [
            rng.permutation(rows_of[label])
            for _ in range(epochs)
            for label in classes
        ]
        return np.concatenate(order)[: steps * size].reshape(steps, size)
    together = 1 if regime == "one_class" else 2
    return np.stack(
        [
            np.concatenate(
                [
                    rng.choice(rows_of[label], size // together)
                    for label in rng.choice(classes, together, replace=False)
                ]
            )
            for _ in range(steps)
        ]
    )
