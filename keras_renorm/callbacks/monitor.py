"""How far training is from inference, while `fit` runs."""

import warnings
from typing import Any

import keras
import numpy as np

from keras_renorm._checks import check_boolean, check_integer
from keras_renorm.callbacks._executions import Executions
from keras_renorm.callbacks._monitor.clock import Clock
from keras_renorm.callbacks._monitor.messages import (
    batches_message,
    limits_messages,
)
from keras_renorm.callbacks._monitor.readings import (
    LayerState,
    draw_steps,
    figures_of,
    has_moved,
    logged_names,
    means_of,
    read_moved,
    read_state,
)
from keras_renorm.callbacks._sharing import SharesData
from keras_renorm.diagnostics._report.comparison import comparison
from keras_renorm.layers.batch_renormalization import BatchRenormalization
from keras_renorm.models._data.batches import Batches
from keras_renorm.models._layers.finding import (
    Choice,
    check_no_keras_renorm,
    describe,
    names_of,
    require_layers,
)

# Batches of `dataset` that are looked at.
DATASET_BATCHES = 16


class RenormMonitor(SharesData, keras.callbacks.Callback):
    """Writes down r, d and the gap between training and inference in `fit`.

    Every so many steps it reads the moving statistics before and after the
    step, and inverts the moving average:

        batch_mean = (after - momentum * before) / (1 - momentum)

    and the variance likewise. So it sees the statistics of the batch that the
    step trained on, augmented and shuffled, with nothing added to the graph;
    and from them r, d and, in closed form, how far the layer's training-mode
    outputs were from its inference-mode outputs for that batch.

    At the end of each epoch `logs` get the means over the epoch's probes:
    `renorm_r` and `renorm_d` (95 % quantiles over channels of max(r, 1 / r) and
    of |d|), `renorm_clipped` (share of channels where r or d is beyond the
    limits; of layers without limits, 3 and 5), `renorm_gap`, and, of
    `BatchRenormalization` layers, `renorm_r_max`, `renorm_d_max` and
    `renorm_correction` (how far the layer corrects, 0 to 1; 0 where it finds
    minibatches good, which is batch normalization, and no fault); the
    largest of all layers under these names, and with `per_layer=True` each
    layer's with its name before: `"bn1/renorm_gap"`. Each epoch has the names
    of the first; a figure that an epoch cannot have is NaN (all layers are
    frozen, say). History has them, and so have `CSVLogger` and `TensorBoard`
    if they come after this callback in the list. Layers have the names that
    `keras_renorm.get_statistics` gives them.

    In a second `fit` of the same model, rows and steps continue; a new monitor
    of a run that is resumed (`initial_epoch=`, `BackupAndRestore`) counts the
    steps of the epochs before it.

    It warns, once in its life with a model: when `fit` ends, if limits are
    still closed (r_max is 1 and d_max is 0), or if limits that have relaxed to
    their end still clip more than a quarter of the values of a layer that
    corrects; after the first
    epoch, if the batches of `dataset` are no random draws, or cannot be
    compared; and after the first batch, if it did not reach a layer, which is
    then left out. None of this ends `fit`.

    Limits: a layer that is frozen is left out, and so is one of momentum 0 or
    1. With `steps_per_execution`, and for a `BatchRenormalization` layer
    called several times a step, the figures are those of the average batch
    between two readings. Another layer called several times a step reads as
    the sum of its calls. Rounding leaves an error of about 1e-7 / (1 -
    momentum) of the moving statistics. Under a strategy, replicas that do not
    synchronize are averaged.

    Args:
        every: Steps from one probe to the next, >= 1. An epoch that has none
            gets one at its last step, or, where its length is unknown, at
            the last power of two. Defaults to 100.
        dataset: `None` (default), or the training data in its batches, as for
            `recalibrate`: 16 of them are compared after the first epoch, as
            `keras_renorm.diagnostics.discrepancy` does, to see whether they
            are random draws.
        log_dir: `None` (default), or a folder for TensorBoard, which gets
            each probe.
        per_layer: Whether `logs` get each layer's figures, too (TensorBoard
            and `rows` always do): seven more a layer, in the progress bar as
            well. Defaults to `False`.
        layers: Which layers to watch: `None` (default) for all, a layer, a
            name, a list of these, or a function of a layer.

    Attributes:
        rows: A dict for each probe and layer, for `pandas.DataFrame`;
            `plot()` draws them.

    Raises:
        TypeError, ValueError: If an argument is of the wrong kind or out of
            range; when `fit` begins, if the model has no batch normalization,
            or has Keras layers with `renorm=True` (`convert` them).
        ImportError: If `log_dir` is given and tensorboard is not installed.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((4,)), BatchRenormalization(name="bn", r_max=2.0)
    ... ])
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(size=(64, 4))
    >>> monitor = RenormMonitor(every=4)
    >>> history = model.fit(x, x, verbose=0, callbacks=[monitor]).history
    >>> history["renorm_r_max"]
    [2.0]

    References:
        Ioffe 2017, arXiv:1702.03275, section 3.
    """

    def __init__(
        self,
        every: int = 100,
        dataset: Any = None,
        log_dir: Any = None,
        per_layer: bool = False,
        layers: Choice = None,
    ) -> None:
        super().__init__()
        self.every = check_integer("every", every, minimum=1)
        self.per_layer = check_boolean("per_layer", per_layer)
        self.dataset = dataset
        self.log_dir = log_dir
        self.layers = layers
        self.rows: list[dict[str, Any]] = []
        self._writer = None if log_dir is None else _writer(log_dir)
        self._watched: Any = None
        self._layers: list[Any] = []
        self._names: list[str] = []
        self._before: list[LayerState] | None = None
        self._clock = Clock(self.every)
        self._executions = Executions(self)
        self._epoch_rows: list[dict[str, Any]] = []
        # Of an epoch of unknown length: its probe if no other comes.
        self._reserve: list[dict[str, Any]] = []
        self._logged: list[str] | None = None
        self._warned: set[str] = set()
        self._is_complete = False
        self._is_compared = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds the layers; those that are not built, after the first batch."""
        check_no_keras_renorm(self._find_layers())
        if self.dataset is not None and self.model.built:
            self._batches()  # raises
        if self._watched is not self.model:
            self._watched = self.model
            self.rows, self._clock = [], Clock(self.every)
            self._warned = set()
            self._is_compared = self.dataset is None
        self._epoch_rows, self._reserve = [], []
        self._before = self._logged = None
        self._executions.begin_run()
        self._clock.size = self._executions.size

    def on_epoch_begin(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Begins to gather."""
        self._epoch_rows, self._reserve = [], []
        self._clock.begin_epoch(epoch, self.params.get("steps"))

    def on_train_batch_begin(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Reads the moving statistics, where a probe is due."""
        self._before = None
        self._executions.begin(batch)
        if self._clock.begin(batch) and self._layers:
            self._synchronize()
            self._before = [read_state(layer) for layer in self._layers]

    def on_train_batch_end(
        self, batch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Reads them again."""
        is_due = self._clock.end(self._executions.end(batch))
        if self._before is not None:
            self._synchronize()
            rows = self._read_rows(self._before)
            self._before = None
            if is_due:
                self._add(rows)
                self._clock.probed(has_figures=bool(rows))
            else:
                self._reserve = rows or self._reserve
        if not self._is_complete:
            self._find_layers(is_last=True)

    def on_epoch_end(
        self, epoch: int, logs: dict[str, Any] | None = None
    ) -> None:
        """Writes the means of the epoch's probes into `logs`."""
        if not self._epoch_rows:
            self._add(self._reserve)
        means = means_of(self._epoch_rows, self.per_layer)
        if self._logged is None:
            # `CSVLogger` takes its columns from the first epoch.
            self._logged = [*logged_names(self._layers), *means]
        if logs is not None:
            logs.update({key: means.get(key, np.nan) for key in self._logged})
        if not self._is_compared:
            self._is_compared = True
            try:
                found = comparison(self.model).run(
                    self._batches(), verbose=False
                )
                message = batches_message(found.layers)
                if message is not None:
                    warnings.warn(message, stacklevel=2)
            except Exception as error:  # watching ends no `fit`
                self._warn(
                    "dataset", f"`dataset` could not be compared: {error}"
                )

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Warns of limits that are closed, or that clip too much."""
        layers = {
            name: layer
            for name, layer in zip(self._names, self._layers, strict=True)
            if isinstance(layer, BatchRenormalization)
            and layer.trainable
            and not layer.frozen_statistics
        }
        messages = limits_messages(layers, self._epoch_rows)
        for kind, message in messages.items():
            self._warn(kind, message)
        if self._writer is not None:
            self._writer.flush()

    def plot(self) -> Any:
        """Draws the rows of each layer over the steps: gap, r, d, correction.

        Returns:
            A `matplotlib.figure.Figure`.

        Raises:
            ImportError: Without matplotlib.
        """
        return draw_steps(self.rows)

    def _find_layers(self, is_last: bool = False) -> list[Any]:
        """All layers to watch; those that are built are watched."""
        chosen = require_layers(self.model, self.layers)
        self._layers = [layer for layer in chosen if layer.built]
        self._names = names_of(self.model, self._layers)
        unbuilt = [layer for layer in chosen if not layer.built]
        self._is_complete = is_last or not unbuilt
        if is_last and unbuilt:
            self._warn(
                "unbuilt",
                "`RenormMonitor` leaves out layers that the first batch did "
                f"not reach: {describe(unbuilt, self.model)}.",
            )
        return chosen

    def _synchronize(self) -> keras.Model:
        """Puts weights into the model that Keras's JAX trainer holds itself."""
        return self.model  # asking for it does

    def _read_rows(self, before: list[LayerState]) -> list[dict[str, Any]]:
        rows = []
        for layer, name, old in zip(
            self._layers, self._names, before, strict=True
        ):
            new = read_moved(layer, old)
            steps = self._clock.stride
            if old.step is not None and new.step is not None:
                steps = new.step - old.step
            if has_moved(layer, old, new) and steps:
                figures = figures_of(layer, old, new, steps)
                rows.append(
                    {"step": self._clock.step, "layer": name, **figures}
                )
        return rows

    def _add(self, rows: list[dict[str, Any]]) -> None:
        self.rows += rows
        self._epoch_rows += rows
        if self._writer is None:
            return
        for row in rows:
            for figure, value in row.items():
                if figure not in ("step", "layer"):
                    tag = f"{row['layer']}/renorm_{figure}"
                    self._writer.add_scalar(tag, value, row["step"])

    def _batches(self) -> Batches:
        return Batches(
            self.dataset, DATASET_BATCHES, 32, self.model, is_most=True
        )

    def _warn(self, kind: str, message: str) -> None:
        """Warns of each kind of thing once: `fit` may be called many times."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=3)


def _writer(log_dir: Any) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError as error:
        raise ImportError(
            "`log_dir` needs tensorboard, which TensorFlow does not install: "
            "pip install tensorboard. Received: log_dir="
            f"{str(log_dir)!r}."
        ) from error
    return Writer(str(log_dir))
