"""How far training and inference are apart, and why."""

from typing import Any

import keras

from keras_renorm import schedules
from keras_renorm._checks import check_at_least
from keras_renorm.diagnostics._report.comparison import Result, comparison
from keras_renorm.diagnostics._report.report import Report
from keras_renorm.diagnostics._report.verdict import verdicts_of
from keras_renorm.models._data.batches import Batches
from keras_renorm.models._layers.finding import Choice, find_layers, has_graph


def discrepancy(
    model: keras.Model,
    dataset: Any,
    steps: int | None = None,
    *,
    layers: Choice = None,
    reference: Any = None,
    r_max: float | None = None,
    d_max: float | None = None,
    batch_size: int = 32,
    verbose: int | bool = True,
) -> Report:
    """Measures how batch normalization differs when it serves.

    Each batch runs twice. In training mode each layer normalizes as in
    training; in inference mode it uses its moving statistics. Everything else
    (dropout, say) infers in both, so that normalization alone differs. Batch
    statistics, r and d are those of the layers' inputs in training mode;
    whether examples within a batch are alike is tested on inputs in inference
    mode, which batches do not mix.

    Nothing in the model changes: no weight, statistic, counter, seed, metric
    or optimizer variable.

    Give it the batches that training uses: their size and their mixture are
    measured. Arrays are cut in the order that they have, while `fit` shuffles
    them; shuffle them before, if so. With `steps`, so many batches of arrays
    are taken at even distances.

    Args:
        model: A built model with batch normalization, Keras's or ours, at any
            depth. With labels in the dataset and a compiled model, loss and
            metrics are computed in both modes, but for metrics that a call
            of the model updates.
        dataset: As for `recalibrate`: arrays, frames, a `tf.data.Dataset`, a
            `PyDataset` or another iterable of `x`, `(x, y)` or `(x, y,
            sample_weight)`.
        steps: Number of batches, or `None` (default) for all. Twenty or more
            tell causes apart well; with one, batches cannot be compared.
        layers: Which layers to report on, as for `recalibrate`. Defaults to
            `None`, for all. Those that the data does not reach are left out,
            with a warning.
        reference: Training data, where `dataset` is other data, in the same
            forms: tells averages that lag from a change of domain. As many
            batches of it are read as of `dataset`, or all if `steps` is
            `None`.
        r_max: Values of r beyond this are counted, >= 1. `None` (default) for
            the present limit of a `BatchRenormalization` layer, 3 for others.
        d_max: The same for d, >= 0; 5 for other layers.
        batch_size: Examples a batch where `dataset` is arrays.
        verbose: Whether to show a progress bar.

    Returns:
        A `Report`: `print` it, `report.verdicts` (cause, reason, remedy,
        layers), `report.rows` for a `pandas.DataFrame`, `report.plot()`.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range; if the model has no batch
            normalization, or is not built; if the dataset is empty, holds
            fewer than `steps` batches, never ends without `steps`, does not
            fit the model's inputs or a layer's channels, reaches no layer, or
            makes activations in training mode that are not
            finite.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((2,)), BatchNormalization(name="bn")
    ... ])
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (640, 2))
    >>> report = discrepancy(model, x, verbose=False)
    >>> [(verdict.cause, verdict.layers) for verdict in report.verdicts]
    [('statistics never trained', ('bn',))]
    >>> recalibrate(model, x, verbose=False)
    >>> discrepancy(model, x, verbose=False).verdicts
    []

    References:
        Ioffe 2017, arXiv:1702.03275, section 3 (r and d). Wu and Johnson
        2021, arXiv:2105.07576 (population statistics, domains, batches that
        are not i.i.d.). Jeffreys 1946, Proc. R. Soc. A 186 (the divergence).
    """
    if r_max is not None:
        r_max = check_at_least("r_max", r_max, schedules.MINIMA["r_max"])
    if d_max is not None:
        d_max = check_at_least("d_max", d_max, schedules.MINIMA["d_max"])
    compared = comparison(model, layers)

    def run(data: Any) -> Result:
        batches = Batches(data, steps, batch_size, model)
        return compared.run(batches, r_max, d_max, verbose)

    referred = None if reference is None else run(reference).layers
    result = run(dataset)
    if referred is not None:  # a layer may be reached by one of them only
        known = {layer.name: layer for layer in referred}
        referred = [known.get(layer.name, layer) for layer in result.layers]
    return Report(
        model=model.name,
        layers=result.layers,
        verdicts=verdicts_of(
            result.layers,
            referred,
            result.gap,
            result.scores,
            _is_convertible(model),
        ),
        gap=result.gap,
        training=result.scores[0],
        inference=result.scores[1],
    )


def _is_convertible(model: keras.Model) -> bool:
    """Whether `convert` reaches all normalization: graphs and wrappers.

    What else holds a layer, it may reach or not.
    """
    reached: set[int] = set()

    def reach(layer: Any) -> None:
        reached.add(id(layer))
        if has_graph(layer):
            for held in layer.layers:
                reach(held)
        elif isinstance(layer, keras.layers.Wrapper):
            reach(layer.layer)

    reach(model)
    return all(
        id(layer) in reached
        for layer in find_layers(model, keras.layers.BatchNormalization)
    )
