"""Batch normalization."""

from collections.abc import Callable
from typing import Any

import keras

from keras_renorm._backend import repetition, runtime, watching
from keras_renorm._backend.operations import Tensor, ops
from keras_renorm._backend.variables import read
from keras_renorm._checks import (
    Intended,
    check_boolean,
    check_momentum,
    warn_of_low_momentum,
)
from keras_renorm._step import choice, pooling, recomputation
from keras_renorm._step.inference import normalize_by_moving_statistics
from keras_renorm._step.moments import align_mask
from keras_renorm._step.pooling import Pool
from keras_renorm._step.records import GradientMemory, Limits, Parameters, State
from keras_renorm._step.training import normalize_by_batch
from keras_renorm.layers._arguments import (
    CheckedArguments,
    check_no_groups,
    check_sharing,
)
from keras_renorm.layers._weights import CheckedWeights


@keras.saving.register_keras_serializable(package="keras_renorm")
class BatchNormalization(
    CheckedArguments, CheckedWeights, keras.layers.BatchNormalization
):
    """Batch normalization that bad batches do not break and that can be frozen.

    `keras.layers.BatchNormalization`'s numbers and weights; its files load both
    ways.

        y = gamma * (x - mean) / sqrt(variance + epsilon) + beta
        moving = moving * momentum + batch * (1 - momentum)

    Training takes mean and population variance of the batch (divisor: number
    of elements), and then moves the moving statistics. Inference takes these.

    - **Frozen.** With `frozen_statistics=True` training takes the moving
      statistics too and keeps them; gamma and beta train. With `trainable =
      False` nothing trains and nothing moves, as in Keras. Both hold for any
      `training` flag, at any depth, from the next `compile` on
      (`keras_renorm.freeze_statistics` acts at once).
    - **Mask.** Elements under a `False` reach neither statistics nor gradients,
      even if they hold NaN; the outputs there are unspecified.
    - **Bad batches.** A channel whose batch mean or variance is not finite, and
      a batch without (unmasked) elements, leave the moving statistics as they
      are. Loss and gradients still show it, so that loss scaling sees it.
    - **Replicas.** With `synchronized=True` the examples of all replicas of a
      `tf.distribute` strategy are normalized as on one device. Without it each
      replica normalizes its own, and moving statistics are averaged where they
      are read, which leaves out the variance between the replicas' means.
      Keras's JAX backend sees one whole batch either way.
    - **Virtual batches.** With a `virtual_batch_size`, training normalizes each
      group of consecutive examples by itself ("ghost batches"), the rest as a
      group of its own. The moving statistics get those of the whole batch.
    - **Types.** Statistics, gamma and beta are float32 under every 16-bit
      policy, float64 under a float64 policy.

    Derivatives of any order are those of the formulas. docs/design.md has how a
    step is computed, and docs/backends.md what differs between them.

    Args:
        axis: The channel axis, an integer. -1 (default) for channels last, 1
            for channels first.
        momentum: Share of the old moving statistics kept at each step, in
            [0, 1]. Defaults to 0.99; take 0.9 to 0.95 where a run has only a
            few hundred steps. (PyTorch's is 1 minus this: between 0 and 0.5 the
            constructor warns.) May be assigned, like `epsilon`; in a graph that
            takes effect when the model is compiled next.
        epsilon: Added to the variance under the root, > 0. Defaults to 1e-3.
        synchronized: Whether replicas share a batch's statistics (`False`).
        virtual_batch_size: Examples that training normalizes together, an
            integer of at least 1, or `None` (default) for the whole batch. Not
            with `synchronized`, nor where `axis` is the first axis.
        frozen_statistics: Whether training takes the moving statistics too
            (`False`). An attribute as well.
        center, scale, beta_initializer, ..., name: As
            `keras.layers.BatchNormalization`.
        **layer_arguments: The others of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor `(batch, ..., channels)` (or channels on `axis`) of
            rank 2 or more. Batch and spatial sizes may be unknown. A
            `tf.RaggedTensor` is as a padded one under a mask.
        training: Whether to train or to infer. Keras sets it in `fit`.
        mask: Tensor of 0 and 1, or booleans, whose axes are the leading
            non-channel axes of `inputs`, broadcast over the others: `(batch,)`,
            `(batch, time)`, ... (or with the channel axis among them, as
            `Masking` makes it of channels first).

    Returns:
        A tensor of the shape of `inputs`, in the policy's compute type.

    Raises:
        TypeError: If an argument is of the wrong kind, or Keras's `renorm=True`
            is given (use `BatchRenormalization`).
        ValueError: If an argument is out of its range, `virtual_batch_size`
            is given with `synchronized` or with channels on the first axis,
            `axis` is not an axis of the input, the number of channels is
            unknown, or `mask` does not broadcast.

    Example:

    >>> layer = BatchNormalization(momentum=0.9)
    >>> outputs = layer(np.random.normal(5.0, 2.0, (64, 3)), training=True)
    >>> bool(ops.abs(ops.mean(outputs)) < 1e-5)
    True

    References:
        Ioffe and Szegedy 2015, arXiv:1502.03167, Algorithm 1. Virtual batches:
        Hoffer, Hubara and Soudry 2017, arXiv:1705.08741, Algorithm 1.
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        *,
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
        layer_arguments = self._check_layer_arguments(layer_arguments)
        synchronized = self.checks["synchronized"](synchronized)
        virtual_batch_size = self.checks["virtual_batch_size"](
            virtual_batch_size
        )
        check_sharing(synchronized, virtual_batch_size)
        warn_of_low_momentum(momentum)
        super().__init__(
            axis=self.checks["axis"](axis),
            momentum=self.checks["momentum"](momentum),
            epsilon=self.checks["epsilon"](epsilon),
            center=self.checks["center"](center),
            scale=self.checks["scale"](scale),
            beta_initializer=beta_initializer,
            gamma_initializer=gamma_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            beta_regularizer=beta_regularizer,
            gamma_regularizer=gamma_regularizer,
            beta_constraint=beta_constraint,
            gamma_constraint=gamma_constraint,
            trainable=check_boolean("trainable", trainable),
            dtype=dtype,
            name=name,
            **layer_arguments,
        )
        # Not through Keras's constructor, which takes it on TensorFlow only.
        self.synchronized = synchronized
        self.virtual_batch_size = virtual_batch_size
        self.frozen_statistics = frozen_statistics
        self._holds_statistics = False
        self._calls = recomputation.Memory()

    @property
    def uses_moving_statistics(self) -> bool:
        """Whether training uses the moving statistics now, and keeps them."""
        return self._frozen_statistics or self._holds_statistics

    # Its name before, for a version. (No warning: Keras reads all attributes.)
    statistics_stand = uses_moving_statistics

    def hold_statistics(self, value: bool) -> None:
        """Freezes the statistics for a while, or ends that, for callbacks.

        Like `frozen_statistics`, but in no configuration, file or copy.
        """
        self._holds_statistics = value

    @property
    def frozen_statistics(self) -> bool:
        """Whether training, too, uses the moving statistics and keeps them."""
        return self._frozen_statistics

    @frozen_statistics.setter
    def frozen_statistics(self, value: bool) -> None:
        self._frozen_statistics = check_boolean("frozen_statistics", value)

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates gamma, beta, moving_mean and moving_variance, in order."""
        check_sharing(self.synchronized, self.virtual_batch_size)
        axis = self._channel_axis(len(input_shape))
        if axis == 0:
            check_no_groups(self.virtual_batch_size, self.axis)
        channels = input_shape[axis]
        if channels is None:
            raise ValueError(
                "The size of the channel axis must be known. Received: "
                f"input_shape={tuple(input_shape)}, axis={self.axis}."
            )
        weight = {
            "shape": (channels,),
            "dtype": choice.statistics_dtype(self.variable_dtype),
            "autocast": False,
        }
        for name, is_wanted in (("gamma", self.scale), ("beta", self.center)):
            if is_wanted:
                kinds = ("initializer", "regularizer", "constraint")
                made_by = {
                    kind: getattr(self, f"{name}_{kind}") for kind in kinds
                }
                setattr(
                    self, name, self.add_weight(name=name, **made_by, **weight)
                )
        self.moving_mean = self._add_statistic(
            "moving_mean", self.moving_mean_initializer, **weight
        )
        self.moving_variance = self._add_statistic(
            "moving_variance", self.moving_variance_initializer, **weight
        )
        self.input_spec = keras.InputSpec(
            ndim=len(input_shape), axes={axis: channels}
        )

    def _add_statistic(
        self, name: str, initializer: Any, **weight: Any
    ) -> keras.Variable:
        """A weight that each replica moves, and that is read as one."""
        # Not `add_weight`, which has no `synchronization`. Keras tracks a
        # variable that becomes an attribute.
        return keras.Variable(
            initializer,
            name=name,
            trainable=False,
            synchronization="on_read",
            # Replicas that share statistics have the same.
            aggregation="only_first_replica" if self.synchronized else "mean",
            **weight,
        )

    def rematerialized_call(
        self, layer_call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Callable[..., Any]:
        """The call as it is, in a `keras.RematScope`: it keeps its inputs only.

        What is normalized once more is one pass over them.
        """
        return layer_call

    def call(
        self, inputs: Tensor, training: bool | None = None, mask: Any = None
    ) -> Tensor:
        """Normalizes `inputs`; moves the statistics in a training step."""
        if runtime.is_ragged(inputs):
            dense, present, restore = runtime.padded(inputs, mask)
            return restore(self.call(dense, training, present))
        axis = self._channel_axis(len(inputs.shape))
        channels = self.moving_mean.shape[0]
        inputs = watching.with_size(inputs, axis, channels)
        if mask is not None:
            mask = align_mask(mask, inputs, axis)
        if training and self.trainable and not self.uses_moving_statistics:
            outputs = self._train(inputs, axis, mask)
        else:
            outputs = self._infer(inputs, axis, mask)
        return ops.cast(outputs, self.compute_dtype)

    def _train(self, inputs: Tensor, axis: int, mask: Tensor | None) -> Tensor:
        dtype = choice.statistics_dtype(inputs.dtype)
        inputs, parameters, memory = self._gradient_memory(
            inputs, self._read_parameters(dtype), dtype
        )
        if runtime.is_traced(inputs):
            self.__dict__["_is_traced"] = True
        state = State(
            *parameters,
            (
                runtime.constant(self.momentum, dtype),
                runtime.constant(1.0 - self.momentum, dtype),
            ),
            self._limits(),
            memory,
        )
        first_passes, second_pass = repetition.remat_calls(inputs)
        is_repeated = bool(first_passes) or second_pass is not None
        is_scaled = runtime.may_scale_loss(inputs, self.compute_dtype)
        if is_repeated and memory and is_scaled:
            if memory.corrects_by_limits:  # it was asked for
                raise NotImplementedError(
                    "`gradient_momentum` must be None in `keras.remat` under "
                    "a float16 policy: the second pass does not see by what "
                    "the loss is multiplied. Received: gradient_momentum="
                    f"{memory.momentum}."
                )
            state = state._replace(memory=None)
        if second_pass is not None:
            state = self._calls.recall(second_pass, state)
        if first_passes:
            self._calls.remember(first_passes, inputs, state)
        pool = Pool(self.synchronized, self.virtual_batch_size)
        outputs, update = normalize_by_batch(inputs, axis, mask, state, pool)
        if second_pass is None:
            self.moving_mean.assign(update.moving_mean)
            self.moving_variance.assign(update.moving_variance)
            self._end_step(state, update)
            if update.probe is not None and is_scaled:
                # So that the backward pass sees the scale of the loss.
                self.add_loss(ops.cast(update.probe, keras.config.floatx()))
        return outputs

    def _infer(self, inputs: Tensor, axis: int, mask: Tensor | None) -> Tensor:
        parameters = self._read_parameters(
            choice.statistics_dtype(inputs.dtype)
        )
        if not self.synchronized:
            moving_mean, moving_variance = pooling.average_over_replicas(
                [parameters.moving_mean, parameters.moving_variance]
            )
            parameters = parameters._replace(
                moving_mean=moving_mean, moving_variance=moving_variance
            )
        return normalize_by_moving_statistics(
            inputs, axis, mask, parameters, self.trainable
        )

    def _read_parameters(self, dtype: str) -> Parameters:
        """The weights, each read once, in the type to compute in."""
        gamma, beta, moving_mean, moving_variance = (
            None if weight is None else read(weight, dtype)
            for weight in (
                self.gamma,
                self.beta,
                self.moving_mean,
                self.moving_variance,
            )
        )
        return Parameters(
            gamma, beta, moving_mean, moving_variance, self.epsilon
        )

    def _channel_axis(self, rank: int) -> int:
        if not -rank <= self.axis < rank:
            raise ValueError(
                f"`axis` must be an axis of the input, which has {rank}. "
                f"Received: axis={self.axis}."
            )
        return self.axis % rank

    def _limits(self) -> Limits | None:
        """How far r and d may go; `None` where there is no correction."""
        return None

    def _gradient_memory(
        self, inputs: Tensor, parameters: Parameters, dtype: str
    ) -> tuple[Tensor, Parameters, GradientMemory | None]:
        """What a step starts from, and what it remembers; `None`: nothing."""
        return inputs, parameters, None

    def _end_step(self, state: Any, update: Any) -> None:
        """Called after each training step that moved the statistics."""

    def get_config(self) -> dict[str, Any]:
        """The arguments of the layer, with their present values."""
        config = super().get_config()
        for name in ("renorm", "renorm_clipping", "renorm_momentum"):
            config.pop(name, None)
        return {
            **config,
            "synchronized": self.synchronized,
            "virtual_batch_size": self.virtual_batch_size,
            "frozen_statistics": self.frozen_statistics,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "BatchNormalization":
        """The layer of a `get_config()`, Keras's BatchNormalization's too."""
        config = dict(config)
        if not config.get("renorm", False):
            for name in ("renorm", "renorm_clipping", "renorm_momentum"):
                config.pop(name, None)
        # Of a layer of ours, whose maker was told.
        if "frozen_statistics" in config and "momentum" in config:
            momentum = check_momentum(config["momentum"])
            config["momentum"] = Intended(momentum)
        return cls(**config)
