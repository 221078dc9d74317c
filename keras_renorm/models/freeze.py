"""Statistics that stay fixed while everything else trains."""

import warnings

import keras

from keras_renorm.layers.batch_normalization import BatchNormalization
from keras_renorm.models._layers.finding import Choice, choose_layers, describe
from keras_renorm.models._layers.graphs import trace_anew
from keras_renorm.models._layers.state import is_untrained


def freeze_statistics(model: keras.Model, *, layers: Choice = None) -> None:
    """Lets a model train with the moving statistics that it has.

    Sets `frozen_statistics` of all our layers in the model, in place: they
    normalize with their moving statistics in training too and never change
    them, while gamma and beta train. It acts at once: in the next `fit` of a
    model that was fitted before, and where `model` is a part of that one.

    Functions of your own that were traced before (`tf.function`, `jax.jit`)
    cannot be reached: they go on as they are. Freeze before you call them
    first, or make them anew.

    Args:
        model: A model with layers of this package, at any depth.
        layers: Which layers, as for `recalibrate`. Defaults to `None`, for
            all.

    Raises:
        ValueError: If the model has none, or Keras's batch normalization is
            among `layers`, which cannot do this (`convert` the model), but
            for what a built model never called; if `layers` chooses none, or
            layers that are not in the model.

    Warns:
        UserWarning: If statistics are as they were made, mean 0 and variance
            1: they were never trained, nor loaded.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), BatchNormalization()])
    >>> x = np.random.normal(5.0, 2.0, (8, 4))
    >>> _ = model(x, training=True)
    >>> freeze_statistics(model)
    >>> bool(ops.all(model(x, training=True) == model(x, training=False)))
    True
    """
    chosen = normalization_layers(model, layers)
    warn_of_untrained(model, chosen)
    _freeze(model, chosen, True)


def unfreeze_statistics(model: keras.Model, *, layers: Choice = None) -> None:
    """Lets the statistics of a model move again: the inverse.

    In place, and at once, as `freeze_statistics`. Ends the freezing that
    `callbacks.FreezeStatistics` began in a `fit` that failed, too.

    Args:
        model: A model with layers of this package, at any depth.
        layers: Which layers, as for `freeze_statistics`.

    Raises:
        ValueError: As `freeze_statistics`.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((4,)), BatchNormalization(frozen_statistics=True)
    ... ])
    >>> unfreeze_statistics(model)
    >>> model.layers[0].frozen_statistics
    False

    Of a frozen backbone, the last few layers:

    >>> backbone = keras.Sequential([keras.Input((4,))])
    >>> for _ in range(3):
    ...     backbone.add(keras.layers.Dense(4))
    ...     backbone.add(BatchNormalization(frozen_statistics=True))
    >>> unfreeze_statistics(backbone, layers=backbone.layers[-3:])
    >>> [layer.frozen_statistics for layer in backbone.layers[1::2]]
    [True, False, False]
    """
    _freeze(model, normalization_layers(model, layers), False)


def _freeze(
    model: keras.Model, layers: list[BatchNormalization], value: bool
) -> None:
    changed = [
        layer for layer in layers if layer.uses_moving_statistics != value
    ]
    for layer in layers:
        layer.frozen_statistics = value
        if not value:
            layer.hold_statistics(False)
    trace_anew(model, changed)


def warn_of_untrained(
    model: keras.Model, layers: list[BatchNormalization]
) -> None:
    """Warns of statistics that are to be frozen and were never trained."""
    untrained = [
        layer
        for layer in layers
        # What a built model never called does not matter.
        if is_untrained(layer) and (layer.built or not model.built)
    ]
    if untrained:
        warnings.warn(
            "Statistics that were never trained are frozen at mean 0 and "
            f"variance 1: layers {describe(untrained, model)}. Load weights, "
            "or train, before.",
            stacklevel=3,
        )


def normalization_layers(
    model: keras.Model, layers: Choice = None
) -> list[BatchNormalization]:
    """The layers that can be frozen; an error if there are others, or none."""
    chosen = choose_layers(model, layers)
    ours = [layer for layer in chosen if isinstance(layer, BatchNormalization)]
    others = [
        layer
        for layer in chosen
        # What a built model never called does not matter.
        if not isinstance(layer, BatchNormalization)
        and (layer.built or not model.built)
    ]
    if others or not ours:
        found = "none at all"
        if others:
            found = f"Keras's own layers {describe(others, model)}"
        raise ValueError(
            "`model` must have batch normalization of keras_renorm only; "
            f"`keras_renorm.convert` makes it. Received: model={model.name}, "
            f"which has {found}."
        )
    return ours
