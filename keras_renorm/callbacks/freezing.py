"""Statistics that stand for the last part of `fit`."""

from typing import Any

import keras

from keras_renorm import arguments
from keras_renorm.layers.batch_normalization import BatchNormalization
from keras_renorm.models.freeze import (
    freeze_statistics,
    normalization_layers,
)


class FreezeStatistics(keras.callbacks.Callback):
    """Freezes the moving statistics for the last part of a run.

    From then on layers normalize in training with the statistics that
    inference uses, and the network adapts to those: what is validated is what
    is trained (`keras_renorm.freeze_statistics`). Accuracy on digits without
    and with it, means of ten seeds (`python benchmarks/quality --only
    regimes_digits`): batch normalization 0.561 -> 0.973 where a minibatch
    holds one class, 0.819 -> 0.957 where it holds one image, 0.988 -> 0.992
    with two; renormalization 0.986 -> 0.990, 0.960 -> 0.965, 0.988 -> 0.990.
    With i.i.d. minibatches of four it makes no difference.

    At the first epoch of that part the training step is traced anew, once.
    When `fit` ends, the layers are as they were: those that were frozen
    before stay so, the others would move again.

    Args:
        begin: Share of the epochs of `fit` after which the statistics stand,
            in (0, 1). Defaults to 0.8: the last fifth. The part begins with
            an epoch: with 12 epochs, 0.8 means that nine move them.

    Raises:
        TypeError: If `begin` is not a number.
        ValueError: If `begin` is out of range; when `fit` begins, if no epoch
            comes before that part, if the model has no layer of this package,
            or if it has Keras's batch normalization too (`convert` it).

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((4,)), BatchRenormalization(), keras.layers.Dense(1)
    ... ])
    >>> model.compile("sgd", "mse")
    >>> x, y = np.random.normal(3.0, 1.0, (64, 4)), np.zeros((64, 1))
    >>> history = model.fit(
    ...     x, y, epochs=5, verbose=0, callbacks=[FreezeStatistics()]
    ... )
    >>> int(model.layers[0].step)  # two steps an epoch, and four epochs
    8
    """

    def __init__(self, begin: float = 0.8) -> None:
        super().__init__()
        self.begin = arguments.check_number("begin", begin)
        if not 0 < self.begin < 1:
            raise ValueError(
                "`begin` must be greater than 0 and less than 1. Received: "
                f"begin={begin}."
            )
        self._first_epoch = 0
        self._frozen: list[BatchNormalization] = []

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds the layers."""
        self._thaw()  # what a run left frozen that an error ended
        normalization_layers(self.model)  # raises
        epochs = self.params["epochs"]
        # 0.58 * 100 is 57.99999999999999.
        self._first_epoch = int(self.begin * epochs + 1e-9)
        if not self._first_epoch:
            raise ValueError(
                "`epochs` must be at least 1 / begin, so that the statistics "
                f"move before they stand. Received: epochs={epochs}, "
                f"begin={self.begin}."
            )

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Freezes, where the last part begins, or is resumed."""
        if epoch < self._first_epoch or self._frozen:
            return
        self._frozen = [
            layer
            for layer in normalization_layers(self.model)
            if not layer.frozen_statistics
        ]
        freeze_statistics(self.model)
        self.model.make_train_function(force=True)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Puts the layers back."""
        self._thaw()

    def _thaw(self) -> None:
        if not self._frozen:
            return
        for layer in self._frozen:
            layer.frozen_statistics = False
        self._frozen = []
        self.model.make_train_function(force=True)
