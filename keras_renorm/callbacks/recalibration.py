"""Population statistics in `fit`."""

from collections.abc import Iterator
from typing import Any

import keras

from keras_renorm.callbacks.sharing import SharesData
from keras_renorm.models.recalibrate import StatisticsPass


class RecalibrateStatistics(SharesData, keras.callbacks.Callback):
    """Recalibrates the moving statistics after each epoch of `fit`.

    Before validation, so that it sees the new statistics, and, without
    validation, at the end of the epoch; see `keras_renorm.recalibrate`.
    Callbacks after this one in the list, such as `ModelCheckpoint`, save them.
    Put Keras's `SwapEMAWeights` before it, and the statistics are those of the
    averaged weights. Training continues with the new statistics.

    Args:
        dataset: As for `recalibrate`; read again after each epoch, so no
            generator, except one that never ends: of it, each epoch takes the
            next `steps` batches. It should not be the validation data. Copies
            of the callback (`copy.deepcopy`) share it.
        steps: Number of batches, or `None` (default) for all.
        **arguments: Others of `recalibrate`; `verbose` is `False` by default.

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
        self._pass: StatisticsPass | None = None
        self._is_due = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds the layers, and checks the arguments."""
        self._pass = StatisticsPass(self.model)
        checked = {**self.arguments}
        checked.pop("verbose")
        self._pass.checked(self.dataset, self.steps, **checked)

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """The statistics will be due when it ends."""
        self._is_due = True

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Recalibrates, where validation begins."""
        self._recalibrate()

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Recalibrates, if there was no validation."""
        self._recalibrate()

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Forgets the model."""
        self._pass = None
        self._is_due = False

    def _recalibrate(self) -> None:
        if self._is_due and self._pass is not None:
            self._pass.run(self.dataset, self.steps, **self.arguments)
        self._is_due = False
