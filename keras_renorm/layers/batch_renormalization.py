"""Batch renormalization."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import keras
import numpy as np
from keras import ops

from keras_renorm import arguments, backend, functional, schedules
from keras_renorm.functional import Tensor
from keras_renorm.layers.batch_normalization import BatchNormalization
from keras_renorm.schedules import LinearRamp


def _check_gradient_momentum(value: Any) -> float | None:
    """`value` as a float in [0, 1), or `None`."""
    if value is None:
        return None
    momentum = arguments.check_number("gradient_momentum", value)
    if not 0 <= momentum < 1:
        raise ValueError(
            "`gradient_momentum` must be at least 0 and below 1, or None. "
            f"Received: gradient_momentum={value}."
        )
    if not backend.keeps_state_backwards():
        raise ValueError(
            "`gradient_momentum` must be None on Keras's "
            f"{backend.name()} backend, where a backward pass cannot "
            f"keep state. Received: gradient_momentum={value}."
        )
    return momentum


@keras.saving.register_keras_serializable(package="keras_renorm")
class BatchRenormalization(BatchNormalization):
    """Batch renormalization: training sees what inference will see.

    Batch normalization trains with the statistics of a batch and infers with
    moving averages. Where batches are small or not i.i.d. the two differ,
    and the network that was trained is not the network that is served.
    Renormalization corrects the training output towards the moving
    statistics.

    **Training** (`training=True`):

        sigma_B = sqrt(batch_variance + epsilon)
        sigma   = sqrt(moving_variance + epsilon)
        r = clip(sigma_B / sigma, 1 / r_max, r_max)
        d = clip((batch_mean - moving_mean) / sigma, -d_max, d_max)
        y = gamma * ((x - batch_mean) / sigma_B * r + d) + beta

    with the moving statistics from before this step, and r and d constant to
    gradients. Then the moving statistics move and the step counter goes up
    by one. With r_max = 1 and d_max = 0 this is batch normalization; where
    nothing is clipped, y is the inference output.

    **Inference**, **frozen**, **mask** and **bad batches**: as
    `BatchNormalization`. A frozen layer's step counter does not change. Where a
    batch has no element, r = 1 and d = 0.

    **Limits are state.** `r_max` and `d_max` are ramps over the layer's own
    `step`, a counter of its training calls (a layer that a model calls twice
    a step counts two). Their numbers live in weights and are evaluated in the
    graph: `layer.r_max = 2.0`, or a `LinearRamp`, takes effect at once in a
    model that is compiled and training, and is saved with the model.
    The default opens them as soon as the moving statistics know the data.
    `keras_renorm.callbacks.RenormScheduler` scales the paper's ramps, made
    for runs of about 130,000 steps, to the length of a run instead.

    **Means of weights** (federated learning, averages over a run) are weights.
    The counter may be a fraction, and infinity is stored as 2**60: a limit of
    a millionth of it is `inf`. Weights that are no state (a limit below its
    minimum, a NaN, a negative variance) are an error in `layer.set_weights`, at
    load, and where they are saved. `Model.set_weights` asks no layer: limits
    below their minima then count as the minima, and assigning a limit sets it
    anew. (The counter ends at 2**24 on JAX and PyTorch.)

    **The corrected gradient.** Algorithm 1 corrects the outputs. With a
    `gradient_momentum`, the gradient is corrected too. That of normalization
    subtracts two means of the minibatch; most of each is replaced by what
    earlier minibatches had in common, which two accumulators for each channel
    hold (the control of Chiley et al. 2019, section 3). How much of it: 0.8 a²
    / (a² + 0.12²), times (r_max - 1) / 2 up to 1, where a, the weight
    `gradient_agreement`, says how alike the gradients of a batch's examples
    are: a moving average of (Σ s)² / (n Σ s²), s being the sum of the gradient
    over an example, of n. It is 1 for a batch of one example, 1/n or less for n
    independent ones, and up to 1 for examples that are alike. So the correction
    acts where batches are small or of one class, and little elsewhere. It moves
    the accumulators where a gradient is computed: each gradient of a persistent
    tape counts, and second derivatives hold them constant. Gradients that are
    not finite do not move them, nor does anything computed under a
    `tf.autodiff.ForwardAccumulator`, where gradients are Algorithm 1's. Under a
    float16 policy the layer adds a zero to `model.losses`, by which it sees the
    scale of the loss: a custom loop with loss scaling must add `model.losses`
    to its loss. TensorFlow only.

    **When, and with which settings.** Accuracies are of batch normalization,
    of this layer, and of it with `gradient_momentum=0.9`: means of ten seeds,
    each at its best rate. In brackets, the experiment: `python -m
    benchmarks.quality --only NAME`; the README there has spreads. "Cluttered"
    digits are the harder task.

    - Batches of one class (or user, or scene): correct the gradient, 0.239 ->
      0.698 -> 0.880 on cluttered digits [regimes_cluttered], 0.561 -> 0.986
      -> 0.988 on plain ones [regimes_digits]; with Adam's defaults 0.494 ->
      0.895 -> 0.989 [optimizers_digits].
    - Batches of one image: correct it, 0.278 -> 0.373 -> 0.671
      [regimes_cluttered], 0.819 -> 0.960 -> 0.979 [regimes_digits].
    - Batches of two images: correct it, 0.780 -> 0.775 -> 0.827
      [regimes_cluttered]; on plain digits all are at 0.988 or 0.989
      [regimes_digits].
    - I.i.d. batches of four and more: batch normalization. With four 0.906 ->
      0.883 -> 0.893, with 16 0.943 -> 0.938 -> 0.935 [regimes_cluttered].
    - One element a channel and example (dense layers), batches of two: 0.663
      -> 0.902 -> 0.953, and group normalization has 0.969
      [regimes_digits_dense].
    - Data sorted by class: no help, 0.904 -> 0.900 -> 0.209
      [regimes_digits]. Shuffle.
    - Fine-tuning in another domain, batches of two: its statistics are the
      old domain's, and batch normalization uses none: 0.888 -> 0.862.
      `recalibrate` first: 0.881 [fine_tuning_digits].
    - `callbacks.FreezeStatistics()` at the end helps where the gradient is
      not corrected: one class 0.760, two images 0.784 [regimes_cluttered].
      Where it is corrected, the layer is better than that without it.
    - `momentum`: 0.99 is best for 3,000 steps and more, 0.95 for 750
      [lengths_digits].

    Args:
        axis: The channel axis, an integer. Defaults to -1.
        momentum: Share of the old moving statistics kept at each step, in
            [0, 1]. Defaults to 0.99.
        epsilon: Added to the variance under the root, > 0. Defaults to 1e-3.
        r_max: Largest correction of the scale, >= 1; the smallest is
            `1 / r_max`. A number or a `LinearRamp`; `inf` does not clip.
            "auto" (default) is 1 for 3 n steps and goes to 3 at step 10 n,
            with n = 1 / (1 - momentum) (`schedules.default_limits`): with
            momentum 0.99, from step 300 to 1,000. `schedules.ioffe2017()` is
            the paper's. Reading it gives a `LinearRamp`.
        d_max: Largest correction of the offset, >= 0, in standard
            deviations. A number or a `LinearRamp`; `inf` does not clip.
            "auto" (default) is 0 for 3 n steps and goes to 5 at step 10 n.
        gradient_momentum: Share of the accumulators kept at each step, in
            [0, 1); 0.9 is a good value. `None` (default) is the gradient of
            Algorithm 1. Not together with `virtual_batch_size`.
        synchronized, ..., name: The other arguments of `BatchNormalization`.
        **layer_arguments: The others of `keras.layers.Layer`.

    Call arguments:
        inputs, training, mask: As `BatchNormalization`.

    Returns:
        A tensor of the shape of `inputs`, in the policy's compute type.

    Raises:
        TypeError, ValueError: As `BatchNormalization`; also if a limit is
            neither a number nor a ramp, or goes below its minimum, or if
            `gradient_momentum` is out of its range, is given with
            `virtual_batch_size`, or on a backend other than TensorFlow.

    Example:

    >>> layer = BatchRenormalization(r_max=2.0, d_max=LinearRamp(0, 1, 0, 50))
    >>> outputs = layer(np.random.normal(5.0, 2.0, (4, 3)), training=True)
    >>> layer.d_max = 3.0
    >>> layer.current_limits()
    (2.0, 3.0)

    References:
        Ioffe 2017, arXiv:1702.03275, Algorithm 1. Chiley et al. 2019,
        arXiv:1905.05894, section 3 (the control of the gradient).
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        *,
        r_max: float | LinearRamp | Literal["auto"] = "auto",
        d_max: float | LinearRamp | Literal["auto"] = "auto",
        gradient_momentum: float | None = None,
        synchronized: bool = False,
        virtual_batch_size: int | None = None,
        frozen_statistics: bool = False,
        center: bool = True,
        scale: bool = True,
        beta_initializer: Any = "zeros",
        gamma_initializer: Any = "ones",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        beta_regularizer: Any = None,
        gamma_regularizer: Any = None,
        beta_constraint: Any = None,
        gamma_constraint: Any = None,
        trainable: bool = True,
        dtype: Any = None,
        name: str | None = None,
        **layer_arguments: Any,
    ) -> None:
        ramps = tuple(
            value
            if isinstance(value, str) and value == "auto"
            else schedules.limit(limit, value)
            for limit, value in (("r_max", r_max), ("d_max", d_max))
        )
        gradient_momentum = _check_gradient_momentum(gradient_momentum)
        _check_groups(gradient_momentum, virtual_batch_size)
        super().__init__(
            axis,
            momentum,
            epsilon,
            synchronized=synchronized,
            virtual_batch_size=virtual_batch_size,
            frozen_statistics=frozen_statistics,
            center=center,
            scale=scale,
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            trainable=trainable,
            dtype=dtype,
            name=name,
            **layer_arguments,
        )
        self.gradient_momentum = gradient_momentum
        # What `build` puts into the weights; they rule from then on.
        defaults = schedules.default_limits(self.momentum)
        self._initial_ramps: tuple[LinearRamp, ...] = tuple(
            default if ramp == "auto" else ramp
            for ramp, default in zip(ramps, defaults, strict=True)
        )
        self.step: Any = None
        self.limit_values: Any = None
        self.limit_steps: Any = None
        self.gradient_mean: Any = None
        self.gradient_projection: Any = None
        self.gradient_agreement: Any = None

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Adds the weights `step`, `limit_values` and `limit_steps`.

        Row 0 of the limits is r_max, row 1 d_max; the columns are where the
        ramp begins and where it ends.
        """
        _check_groups(self.gradient_momentum, self.virtual_batch_size)
        super().build(input_shape)
        values, steps = schedules.store_ramps(self._initial_ramps)
        dtype = self.moving_mean.dtype
        # No integers: a mean of weights would be cut.
        counter = backend.counter_dtype(dtype)
        self.step = self._add_state("step", 0, counter)
        self.limit_values = self._add_state("limit_values", values, dtype)
        self.limit_steps = self._add_state("limit_steps", steps, counter)
        if self.gradient_momentum is None:
            return
        weight = {
            "shape": self.moving_mean.shape,
            "dtype": self.moving_mean.dtype,
            "autocast": False,
        }
        self.gradient_mean = self._add_statistic(
            "gradient_mean", "zeros", **weight
        )
        self.gradient_projection = self._add_statistic(
            "gradient_projection", "zeros", **weight
        )
        # All of the gradient is corrected until there is evidence that the
        # means of batches are good.
        self.gradient_agreement = self._add_statistic(
            "gradient_agreement", "ones", **weight
        )

    def _add_state(self, name: str, value: Any, dtype: str) -> keras.Variable:
        return self.add_weight(
            name=name,
            shape=np.shape(value),
            dtype=dtype,
            initializer=lambda shape, dtype: ops.convert_to_tensor(
                value, dtype=dtype
            ),
            trainable=False,
            autocast=False,
            # The same on all replicas, and a counter must not be summed.
            aggregation="only_first_replica",
        )

    @property
    def r_max(self) -> LinearRamp:
        """Limit of r, as a ramp over `step`; assign a number or a ramp."""
        return self._ramp(0)

    @r_max.setter
    def r_max(self, value: float | LinearRamp) -> None:
        self._set_ramp(0, schedules.limit("r_max", value))

    @property
    def d_max(self) -> LinearRamp:
        """Limit of d, as a ramp over `step`; assign a number or a ramp."""
        return self._ramp(1)

    @d_max.setter
    def d_max(self, value: float | LinearRamp) -> None:
        self._set_ramp(1, schedules.limit("d_max", value))

    checks: ClassVar[dict[str, Callable[[Any], Any]]] = {
        **BatchNormalization.checks,
        "gradient_momentum": _check_gradient_momentum,
    }

    def __setattr__(self, name: str, value: Any) -> None:
        if name in schedules.MINIMA:
            # TensorFlow reads what is there first, which may be no limit.
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def current_limits(self) -> tuple[float, float]:
        """The values of r_max and d_max that the next training step uses."""
        step = 0.0 if self.step is None else self._step()
        return self.r_max(step), self.d_max(step)

    def current_step(self) -> int:
        """How many training calls the layer has seen."""
        return 0 if self.step is None else round(self._step())

    def _step(self) -> float:
        return float(backend.to_numpy(self.step))

    def _ramp(self, row: int) -> LinearRamp:
        if not self.built:
            return self._initial_ramps[row]
        return schedules.stored_ramp(
            list(schedules.MINIMA)[row],
            self.name,
            backend.to_numpy(self.limit_values)[row],
            backend.to_numpy(self.limit_steps)[row],
        )

    def _set_ramp(self, row: int, ramp: LinearRamp) -> None:
        if not self.built:
            ramps = list(self._initial_ramps)
            ramps[row] = ramp
            self._initial_ramps = tuple(ramps)
            return
        for variable, new in zip(
            (self.limit_values, self.limit_steps),
            schedules.store_ramps([ramp]),
            strict=True,
        ):
            rows = backend.to_numpy(variable)
            rows[row] = new[0]
            variable.assign(rows)

    def _limits(self) -> functional.Limits:
        return functional.Limits(
            *(
                backend.read(weight, weight.dtype)
                for weight in (self.limit_values, self.limit_steps, self.step)
            )
        )

    def _feedback(
        self, inputs: Tensor, dtype: str
    ) -> tuple[Tensor, functional.Feedback | None]:
        if self.gradient_momentum is None:
            return inputs, None
        inputs, mean, projection, agreement = backend.with_accumulators(
            inputs,
            [
                self.gradient_mean,
                self.gradient_projection,
                self.gradient_agreement,
            ],
            dtype,
        )
        return inputs, functional.Feedback(
            mean, projection, agreement, self.gradient_momentum
        )

    def _end_step(self) -> None:
        self.step.assign_add(1)

    def _check_state(self, weights: Any) -> list[np.ndarray]:
        arrays = super()._check_state(weights)
        if not self.built:
            return arrays
        step, values, steps = (
            next(i for i, each in enumerate(self.weights) if each is weight)
            for weight in (self.step, self.limit_values, self.limit_steps)
        )
        if not np.isfinite(arrays[step]):
            raise ValueError(
                f"`step` of layer {self.name} must be finite. Received: "
                f"step={arrays[step]}."
            )
        # Earlier versions stored infinity.
        arrays[values], _ = schedules.store_ramps(
            schedules.stored_ramp(name, self.name, *rows)
            for name, *rows in zip(
                schedules.MINIMA, arrays[values], arrays[steps], strict=True
            )
        )
        return arrays

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, with the present limits."""
        config = super().get_config()
        config["gradient_momentum"] = self.gradient_momentum
        for name, ramp in (("r_max", self.r_max), ("d_max", self.d_max)):
            config[name] = (
                ramp.initial_value
                if ramp.is_flat
                else keras.saving.serialize_keras_object(ramp)
            )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BatchRenormalization":
        """The layer of a `get_config()`."""
        config = dict(config)
        for name in ("r_max", "d_max"):
            if isinstance(config.get(name), dict):
                config[name] = keras.saving.deserialize_keras_object(
                    config[name]
                )
        return super().from_config(config)


def _check_groups(
    gradient_momentum: float | None, virtual_batch_size: int | None
) -> None:
    if gradient_momentum is not None and virtual_batch_size is not None:
        raise ValueError(
            "`gradient_momentum` must be None where virtual_batch_size is "
            "given: groups of one batch share their moving statistics, and "
            "none of them comes after another. Received: "
            f"gradient_momentum={gradient_momentum}, "
            f"virtual_batch_size={virtual_batch_size}."
        )
