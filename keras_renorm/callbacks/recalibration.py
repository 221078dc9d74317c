"""Population statistics in `fit`."""

import warnings
from collections.abc import Iterator
from typing import Any

import keras
from keras import ops

from keras_renorm._backend.variables import to_numpy
from keras_renorm.callbacks._sharing import SharesData
from keras_renorm.models._data.passes import NotFiniteError
from keras_renorm.models._layers.finding import require_layers
from keras_renorm.models.recalibrate import statistics_pass


class RecalibrateStatistics(SharesData, keras.callbacks.Callback):
    """Recalibrates the moving statistics after each epoch of `fit`.

    Before validation, so that it sees the new statistics; and at the end of
    the epoch and of `fit`, where the weights have changed since: an optimizer
    with `use_ema` puts its averages in last, `SwapEMAWeights` removes them
    after validation. See `keras_renorm.recalibrate`. Callbacks after this one
    in the list, such as `ModelCheckpoint`, save the statistics. Training
    continues with them.

    Frozen layers keep theirs (`frozen_statistics`, `trainable=False`), unless
    they are among `layers`. Activations that are not finite leave all as they
    were, with a warning.

    Args:
        dataset: As for `recalibrate`; read again after each epoch, so no
            generator, except one that never ends: of it, each epoch takes the
            next `steps` batches. It should not be the validation data. Copies
            of the callback (`copy.deepcopy`) share it.
        steps: Number of batches, or `None` (default) for all.
        **arguments: Others of `recalibrate` (`layers`, `batch_size`, ...);
            `verbose` is `False` by default.

    Raises:
        TypeError, ValueError: If `dataset` can be read only once and `steps`
            is `None`; when `fit` begins, if the model has no batch
            normalization, or an argument is not as `recalibrate` takes it;
            after an epoch, as `recalibrate`. The statistics are then as
            training left them.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((4,)), BatchNormalization(), keras.layers.Dense(1)
    ... ])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.random.normal(3.0, 1.0, (64, 4)), np.zeros((64, 1))
    >>> callback = RecalibrateStatistics(x)
    >>> history = model.fit(x, y, verbose=0, callbacks=[callback])
    >>> bool(np.allclose(model.layers[0].moving_mean, x.mean(axis=0), 1e-4))
    True
    """

    def __init__(
        self, dataset: Any, steps: int | None = None, **arguments: Any
    ) -> None:
        super().__init__()
        if isinstance(dataset, Iterator) and steps is None:
            raise ValueError(
                "`dataset` must be one that can be read again, for it is read "
                "after each epoch; or never end, with `steps`. Received: "
                f"dataset=<{type(dataset).__name__}>, steps=None."
            )
        self.dataset = dataset
        self.steps = steps
        self.arguments = {"verbose": False, **arguments}
        self._layers = self.arguments.pop("layers", None)
        # Of the weights that the statistics are of; `None` outside `fit`.
        self._mark: Any = None
        self._is_silent = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds the layers, and checks the arguments."""
        arguments = {**self.arguments}
        arguments.pop("verbose")
        chosen = self._chosen()
        if chosen and self.model.built:
            statistics_pass(self.model, chosen).checked(
                self.dataset, self.steps, **arguments
            )
        self._mark = ()
        self._is_silent = False

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Recalibrates, where validation begins."""
        self._recalibrate()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Recalibrates, if there was no validation."""
        self._recalibrate()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Recalibrates, if weights have changed since the last epoch."""
        self._recalibrate()
        self._mark = None

    def _chosen(self) -> list[Any]:
        """The layers that were asked for, or all that move."""
        chosen = require_layers(self.model, self._layers)
        if self._layers is not None:
            return chosen
        return [
            layer
            for layer in chosen
            if layer.trainable
            and not getattr(layer, "uses_moving_statistics", False)
        ]

    def _recalibrate(self) -> None:
        if self._mark is None or self._mark == self._marked():
            return
        chosen = self._chosen()
        if chosen:
            with warnings.catch_warnings():
                if self._is_silent:  # it was reported after the first epoch
                    warnings.simplefilter("ignore")
                try:
                    statistics_pass(self.model, chosen).run(
                        self.dataset, self.steps, **self.arguments
                    )
                except NotFiniteError as error:
                    warnings.warn(
                        f"Statistics were not recalibrated. {error}",
                        stacklevel=2,
                    )
            self._is_silent = True
        self._mark = self._marked()

    def _marked(self) -> tuple[Any, ...]:
        """A mark that differs where weights or statistics have changed.

        Of the first of each: a change of all changes some of these.
        """
        return tuple(
            to_numpy(ops.reshape(variable, (-1,))[:256]).tobytes()
            for variable in (
                *self.model.trainable_variables,
                # Frozen or not: to thaw some changes no statistics.
                *(
                    layer.moving_mean
                    for layer in require_layers(self.model, self._layers)
                    if layer.built
                ),
            )
        )
