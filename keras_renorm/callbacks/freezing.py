"""Statistics that stay fixed in the last part of `fit`."""

import itertools
import math
import warnings
from typing import Any

import keras
from keras import ops

from keras_renorm._checks import check_number
from keras_renorm.layers.batch_normalization import BatchNormalization
from keras_renorm.models._layers.graphs import trace_anew
from keras_renorm.models.freeze import (
    normalization_layers,
    warn_of_untrained,
)

# A loss that rises by more than this share of itself after the freezing, and by
# more than it rose from any epoch to the next before, is not by chance.
LOSS_RISE = 0.5


class FreezeStatistics(keras.callbacks.Callback):
    """Freezes the moving statistics for the last part of a run.

    From then on layers normalize in training with the statistics that
    inference uses, and the network adapts to those: what is validated is what
    is trained (`keras_renorm.freeze_statistics`).

    **Let the learning rate decay.** The statistics are fixed, and weights that
    still move fast no longer fit them: at a rate that does not decay, this can
    destroy a trained network. The callback warns if it freezes while the rate
    is as high as it ever was in this run, and if the loss rises afterwards.

    `BatchRenormalization()` does not need it; docs/evidence.md has both.

    At the first epoch of that part the training step is traced again, once
    (and so is the validation step). When `fit` ends, the layers are as they
    were: those that were frozen before stay so, the others would move again.
    The freezing is no configuration: what `ModelCheckpoint` or `model.save`
    writes in that part has `frozen_statistics` as you set it. After a `fit`
    that an error ended in that part, the next `fit` with this callback begins
    unfrozen; without it, call `keras_renorm.unfreeze_statistics(model)`.

    Args:
        begin: Share of the epochs of `fit` after which the statistics are
            fixed, in (0, 1). Defaults to 0.8: the last fifth. The part begins
            with an epoch: with 12 epochs, 0.8 means that nine move them.

    Raises:
        TypeError: If `begin` is not a number.
        ValueError: If `begin` is out of range; when `fit` begins, if no epoch
            comes before that part, if the model has no layer of this package,
            or if it has Keras's batch normalization too (`convert` it).

    Warns:
        UserWarning: If the learning rate has not decayed where the part
            begins; if the loss of an epoch in it is 1.5 times that before (and
            rose by more than between any two epochs before), or not finite; if
            `fit` ends before it, as with `EarlyStopping`; if statistics were
            never trained.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((4,)),
    ...     BatchRenormalization(momentum=0.5),  # there are eight steps only
    ...     keras.layers.Dense(1),
    ... ])
    >>> rate = keras.optimizers.schedules.CosineDecay(0.01, decay_steps=10)
    >>> model.compile(keras.optimizers.SGD(rate), "mse")
    >>> x, y = np.random.normal(3.0, 1.0, (64, 4)), np.zeros((64, 1))
    >>> history = model.fit(
    ...     x, y, epochs=5, verbose=0, callbacks=[FreezeStatistics()]
    ... )
    >>> int(model.layers[0].step)  # two steps an epoch, and four epochs
    8
    """

    def __init__(self, begin: float = 0.8) -> None:
        super().__init__()
        self.begin = check_number("begin", begin)
        if not 0 < self.begin < 1:
            raise ValueError(
                "`begin` must be greater than 0 and less than 1. Received: "
                f"begin={begin}."
            )
        self._first_epoch = 0
        self._held: list[BatchNormalization] = []
        self._is_frozen = False
        self._begins = False  # the last part, with this epoch
        self._is_rate_due = False
        # Of the epochs of this run: learning rates at first, and losses.
        self._rates: list[float] = []
        self._losses: list[float] = []
        self._loss_before = math.nan
        self._largest_rise = 0.0

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds the layers."""
        self._thaw()  # after a run that an error ended
        # Another instance may have left some.
        self._held = [
            layer
            for layer in normalization_layers(self.model)  # raises
            if layer.uses_moving_statistics and not layer.frozen_statistics
        ]
        self._thaw()
        epochs = self.params["epochs"]
        # 0.58 * 100 is 57.99999999999999.
        self._first_epoch = int(self.begin * epochs + 1e-9)
        if not self._first_epoch:
            raise ValueError(
                "`epochs` must be at least 1 / begin, so that the statistics "
                f"move before they are frozen. Received: epochs={epochs}, "
                f"begin={self.begin}."
            )
        self._rates, self._losses = [], []
        self._loss_before = math.nan

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Freezes, where the last part begins, or is resumed."""
        self._begins = epoch >= self._first_epoch and not self._is_frozen
        if self._begins:
            self._freeze()
        self._is_rate_due = True

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Looks at the epoch's learning rate."""
        if not self._is_rate_due:
            return
        # Not when the epoch begins: callbacks after this one may set it then.
        self._is_rate_due = False
        rate = _learning_rate(self.model)
        # Nothing is known of a run that is resumed in its last part.
        if self._begins and self._rates and rate >= max(self._rates):
            warnings.warn(
                "`FreezeStatistics` freezes the statistics while the learning "
                f"rate is as high as it ever was in this run ({rate:.3g}). "
                "Weights that move so fast leave them, which can destroy a "
                "trained network: let the rate decay before, as "
                "`keras.optimizers.schedules.CosineDecay` does.",
                stacklevel=2,
            )
        self._rates.append(rate)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Warns, once, if the loss is much above that before the freezing."""
        loss = float((logs or {}).get("loss", math.nan))
        if not self._is_frozen:
            self._losses.append(loss)
            return
        allowed = max(LOSS_RISE * abs(self._loss_before), self._largest_rise)
        is_known = math.isfinite(self._loss_before)
        if is_known and not loss - self._loss_before <= allowed:
            warnings.warn(
                f"The loss rose from {self._loss_before:.4g} to {loss:.4g} "
                "after `FreezeStatistics` froze the statistics: the weights "
                "leave them. Let the learning rate decay before, or do "
                "without this callback.",
                stacklevel=2,
            )
            self._loss_before = math.nan

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Makes the layers as they were before `fit`."""
        if self._rates and not self._is_frozen:
            warnings.warn(
                "`FreezeStatistics` froze nothing: `fit` ended before epoch "
                f"{self._first_epoch + 1} of {self.params['epochs']}, with "
                "which the last part begins. To freeze after early stopping, "
                "`keras_renorm.freeze_statistics` and `fit` once more.",
                stacklevel=2,
            )
        self._thaw()

    def _freeze(self) -> None:
        layers = normalization_layers(self.model)
        warn_of_untrained(self.model, layers)
        if self._losses:
            self._loss_before = self._losses[-1]
            self._largest_rise = max(
                (
                    new - old
                    for old, new in itertools.pairwise(self._losses)
                    if math.isfinite(new - old)
                ),
                default=0.0,
            )
        self._is_frozen = True
        self._held = [layer for layer in layers if not layer.frozen_statistics]
        self._hold(True)

    def _thaw(self) -> None:
        self._hold(False)
        self._held = []
        self._is_frozen = False

    def _hold(self, value: bool) -> None:
        if not self._held:
            return
        for layer in self._held:
            layer.hold_statistics(value)
        trace_anew(self.model, self._held)


def _learning_rate(model: keras.Model) -> float:
    """That of the next step; NaN where there is none, or not one.

    In a loop without Keras's optimizer, or with one of several.
    """
    optimizer = getattr(model, "optimizer", None)
    rate = getattr(optimizer, "learning_rate", None)
    if rate is None:
        return math.nan
    return float(ops.convert_to_numpy(ops.cast(rate, "float32")))
