"""Batch renormalization."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import keras
import numpy as np

from keras_renorm import schedules
from keras_renorm._backend import repetition, runtime
from keras_renorm._backend.operations import Tensor, ops
from keras_renorm._backend.variables import (
    Accumulator,
    Calls,
    read,
    to_numpy,
    with_accumulators,
)
from keras_renorm._step import gating
from keras_renorm._step.records import GradientMemory, Parameters
from keras_renorm.layers._arguments import (
    GRADIENT_MOMENTUM,
    check_gradient_momentum,
    check_groups,
)
from keras_renorm.layers._limits import StoredLimits
from keras_renorm.layers.batch_normalization import BatchNormalization
from keras_renorm.schedules import LinearRamp


@keras.saving.register_keras_serializable(package="keras_renorm")
class BatchRenormalization(StoredLimits, BatchNormalization):
    """Batch normalization for any minibatches: corrects as far as they need it.

    Batch normalization trains with statistics of a batch and infers with moving
    averages, which differ where batches are small or not i.i.d. This layer
    measures by how much. It corrects outputs and gradients fully where a batch
    holds one image or one class, and hardly where it holds many random
    examples: there it is batch normalization. There is nothing to set.

        sigma_B = sqrt(batch_variance + epsilon)
        sigma   = sqrt(moving_variance + epsilon)
        r = clip(sigma_B / sigma, 1 / r_max, r_max) ** g
        d = clip((batch_mean - moving_mean) / sigma, -d_max, d_max) * g
        y = gamma * ((x - batch_mean) / sigma_B * r + d) + beta

    That is training, with the moving statistics from before the step, and r and
    d constant to gradients. Where nothing is clipped and g = 1, y is what
    inference gives. All else is as of `BatchNormalization`.

    - **How far**, g from 0 to 1, is a number of the layer,
      `layer.current_correction()`. It goes by how alike the gradients and the
      means of a batch's examples are, and by whether successive gradients
      point the same way, in moving averages. A layer begins with g = 1, and
      with closed limits. (docs/design.md has the formula.)
    - **The corrected gradient.** Most of the two means that the gradient of
      normalization subtracts is replaced by those of earlier minibatches
      (Chiley et al. 2019). What the layer remembers moves where a gradient is
      computed: each gradient of a persistent tape counts, second derivatives
      hold it constant, and forward mode takes Algorithm 1's (JAX: an error).
      In float16 the layer adds a zero to `model.losses`, by which it sees the
      scale of the loss: a custom loop with loss scaling must add those.
    - **Limits** that are given, here or by assignment, are Algorithm 1 with
      g = 1; the gradient is corrected then only if `gradient_momentum` was
      given, by (r_max - 1) / 2 up to 1 in the place of g. They are ramps over
      the layer's own `step`, which counts training calls, and state: `layer.
      r_max = 2.0`, or a `LinearRamp`, acts at once, and is saved.
    - **State.** Beside `BatchNormalization`'s: step and limits; to correct the
      gradient, five vectors of a value a channel, and five numbers. Averages of
      weights are valid. Those that are not (a limit below its minimum, a NaN)
      are an error in `layer.set_weights`, at load, and where they are saved.

    Not for data sorted by class (shuffle), nor for batches of one to three
    examples, or of one class, without spatial axes (group normalization is
    ahead). docs/evidence.md has the figures.

    Args:
        axis: The channel axis, an integer. Defaults to -1.
        momentum: Share of the old moving statistics kept at each step, in
            [0, 1]. Defaults to 0.99; 0.95 in runs of less than a thousand
            steps.
        epsilon: Added to the variance under the root, > 0. Defaults to 1e-3.
        r_max: Largest correction of the scale, >= 1; the smallest is
            `1 / r_max`. "auto" (default): the layer measures how far to
            correct, up to 3. That opens from step 3 n, when the moving
            statistics know the data, to step 5 n (200 at least), with n = 1 /
            (1 - momentum): with momentum 0.99, from 300 to 500. Or a number or
            a `LinearRamp`, for Algorithm 1; `inf` does not clip;
            `schedules.ioffe2017()` is the paper's. Reading it gives a
            `LinearRamp`.
        d_max: Largest correction of the offset, >= 0, in standard deviations.
            As `r_max`, up to 5.
        gradient_momentum: Share of the accumulators kept at each step, in
            [0, 1). `None` is the gradient of Algorithm 1, and g = 1. "auto"
            (default) is 0.9 where the limits are "auto" and there is no
            `virtual_batch_size`, and else `None`. A number is not allowed
            together with `virtual_batch_size`.
        synchronized, ..., name: The other arguments of `BatchNormalization`.
        **layer_arguments: The others of `keras.layers.Layer`.

    Call arguments:
        inputs, training, mask: As `BatchNormalization`.

    Returns:
        A tensor of the shape of `inputs`, in the policy's compute type.

    Raises:
        TypeError, ValueError: As `BatchNormalization`; also for a limit that is
            no number or ramp, or below its minimum, and a `gradient_momentum`
            out of its range, or with a `virtual_batch_size`.

    Example:

    >>> layer = BatchRenormalization()
    >>> outputs = layer(np.random.normal(5.0, 2.0, (4, 3)), training=True)
    >>> round(layer.current_correction(), 3), layer.current_limits()
    (1.0, (1.0, 0.0))
    >>> layer.d_max = LinearRamp(0.0, 5.0, begin_step=500, end_step=2_000)

    References:
        Ioffe 2017, arXiv:1702.03275, Algorithm 1. The gradient: Chiley et al.
        2019, arXiv:1905.05894, section 3.
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        *,
        r_max: float | LinearRamp | Literal["auto"] = "auto",
        d_max: float | LinearRamp | Literal["auto"] = "auto",
        gradient_momentum: float | Literal["auto"] | None = "auto",
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
        is_given = any(ramp != "auto" for ramp in ramps)
        corrects_by_limits = gradient_momentum != "auto"
        if not corrects_by_limits:
            gradient_momentum = (
                None
                if is_given or virtual_batch_size is not None
                else GRADIENT_MOMENTUM
            )
        kept = check_gradient_momentum(gradient_momentum)
        check_groups(kept, virtual_batch_size)
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
        self.gradient_momentum = kept
        self._corrects_by_limits = corrects_by_limits
        self._is_given = is_given
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
        self.last_mean: Any = None
        self.last_gradient: Any = None
        self.gate: Any = None
        self.gated: Any = None
        self.seen_gate: Any = None
        self._gradient_calls = Calls()

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Adds the weights: step, limits, what corrects the gradient."""
        check_groups(self.gradient_momentum, self.virtual_batch_size)
        super().build(input_shape)
        dtype = self.moving_mean.dtype
        self._add_limits(dtype)
        if self.gradient_momentum is None:
            return
        make = (
            self._add_statistic
            if runtime.keeps_state_backwards()
            else Accumulator
        )
        # All is corrected until there is evidence that batches are good.
        for name, initializer in (
            ("gradient_mean", "zeros"),
            ("gradient_projection", "zeros"),
            ("gradient_agreement", "ones"),
            ("last_mean", "zeros"),
            ("last_gradient", "zeros"),
            ("gate", "zeros"),
        ):
            weight = {
                "name": name,
                "initializer": initializer,
                "shape": (4,) if name == "gate" else self.moving_mean.shape,
                "dtype": dtype,
                "autocast": False,
            }
            setattr(self, name, make(**weight))
        self.gated = self._add_state("gated", float(not self._is_given), dtype)
        if not runtime.keeps_state_backwards():
            # No state: by it the call of a step that counts is known.
            self.seen_gate = self._add_state("seen_gate", [-1.0] * 7, dtype)

    @property
    def weights(self) -> list[keras.Variable]:
        """The weights, in the same order on all backends."""
        own = [
            getattr(self, name, None)
            for name in (
                *("gamma", "beta", "moving_mean", "moving_variance"),
                *("step", "limit_values", "limit_steps"),
                *("gradient_mean", "gradient_projection"),
                *("gradient_agreement", "last_mean", "last_gradient"),
                *("gate", "gated"),
            )
        ]
        ordered = [weight for weight in own if weight is not None]
        known = set(map(id, [*ordered, self.seen_gate]))
        # Those of a subclass stay where Keras has them: an optimizer's order.
        around = [
            None if id(weight) in known else weight
            for weight in super().weights
        ]
        begin = next((i for i, each in enumerate(around) if each is None), 0)
        rest = [weight for weight in around[begin:] if weight is not None]
        return [*around[:begin], *ordered, *rest]

    checks: ClassVar[dict[str, Callable[[Any], Any]]] = {
        **BatchNormalization.checks,
        "gradient_momentum": check_gradient_momentum,
    }

    def _changed(self, name: str, value: Any) -> Any:
        if name == "gradient_momentum" and not self.built:
            # As if the constructor had been given it.
            self._corrects_by_limits = True
        return super()._changed(name, value)

    def current_correction(self) -> float:
        """How far the next training step corrects, from 0 to 1.

        0 is batch normalization, 1 all that the limits and the weight of the
        gradient allow. 1 where limits were given.
        """
        if not self.is_gated or self.gate is None:
            return 1.0
        agreement, gate = (
            read(weight, weight.dtype)
            for weight in (self.gradient_agreement, self.gate)
        )
        opening = gating.openness(agreement, gating.Gate(*ops.unstack(gate, 4)))
        return float(to_numpy(opening))

    def _gradient_memory(
        self, inputs: Tensor, parameters: Parameters, dtype: str
    ) -> tuple[Tensor, Parameters, GradientMemory | None]:
        # Nothing is remembered of tens of calls in a training step: all begin
        # with the same memory, and what they add to it would be many times what
        # there is to add. And a recurrent cell may be the body of a loop.
        if (
            self.gradient_momentum is None
            or repetition.is_called_step_by_step()
        ):
            return inputs, parameters, None
        (inputs, gamma, beta), accumulators = with_accumulators(
            [inputs, parameters.gamma, parameters.beta],
            added=[
                self.gradient_mean,
                self.gradient_projection,
                self.gradient_agreement,
                self.gate,
            ],
            replaced=[self.last_mean, self.last_gradient],
            dtype=dtype,
            calls=self._gradient_calls,
            seen=self.seen_gate,
        )
        own = self.gradient_momentum, self._corrects_by_limits
        memory = GradientMemory(*(*accumulators, read(self.gated, dtype), *own))
        return inputs, parameters._replace(gamma=gamma, beta=beta), memory

    def _end_step(self, state: Any, update: Any) -> None:
        super()._end_step(state, update)
        if self.seen_gate is not None and state.memory is not None:
            # A batch that moves no statistics will not move the gate.
            seen = ops.where(update.moves(state), self.seen_gate.value, -1.0)
            self.seen_gate.assign(seen)

    @property
    def is_gated(self) -> bool:
        """Whether the gate rules, and not limits that were given."""
        if self.gradient_momentum is None:
            return False
        if self.gated is None:
            return not self._is_given
        return bool(to_numpy(self.gated) > 0)

    def load_own_variables(self, store: Any) -> None:
        """Takes the weights of a file, all of them or none.

        What files of earlier versions lack, which had no gate, or neither it
        nor the corrected gradient, begins as it does in a new layer.
        """
        if self.gated is not None:
            missing = self.weights[len(store.keys()) :]
            first = missing[0] if missing else None
            if first is self.gradient_mean or first is self.last_mean:
                values = [store[f"{i}"] for i in range(len(store.keys()))]
                values += map(self._built_value, missing)
                store = {f"{i}": value for i, value in enumerate(values)}
        super().load_own_variables(store)

    def _built_value(self, weight: Any) -> np.ndarray:
        """What a weight of the gradient's memory holds in a new layer."""
        if weight is self.gated:
            return np.array(float(not self._is_given))
        is_one = weight is self.gradient_agreement
        return np.full(weight.shape, float(is_one))

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, with the present limits."""
        config = super().get_config()
        config["gradient_momentum"] = (
            self.gradient_momentum
            if self._corrects_by_limits
            or self.gradient_momentum != GRADIENT_MOMENTUM
            else "auto"
        )
        for name, ramp in (("r_max", self.r_max), ("d_max", self.d_max)):
            config[name] = (
                "auto"
                if self.is_gated
                else (
                    ramp.initial_value
                    if ramp.is_flat
                    else keras.saving.serialize_keras_object(ramp)
                )
            )
        return config

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BatchRenormalization":
        """The layer of a `get_config()`."""
        config = dict(config)
        limits = {}
        for name in ("r_max", "d_max"):
            if isinstance(config.get(name), dict):
                config[name] = keras.saving.deserialize_keras_object(
                    config[name]
                )
            if config.get("gradient_momentum") == "auto":
                # Given to a layer that was made without, and has its weights.
                limits[name] = config.pop(name, "auto")
        layer = super().from_config(config)
        for name, limit in limits.items():
            if limit != "auto":
                setattr(layer, name, limit)
        return layer
