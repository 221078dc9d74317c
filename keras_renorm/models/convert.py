"""From Keras's batch normalization to ours, and back."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import keras

from keras_renorm import schedules
from keras_renorm._checks import check_boolean
from keras_renorm.layers.batch_normalization import BatchNormalization
from keras_renorm.layers.batch_renormalization import BatchRenormalization
from keras_renorm.models._layers.finding import Choice, describe, require_layers
from keras_renorm.models._layers.state import is_untrained
from keras_renorm.models._surgery import from_tf_keras
from keras_renorm.models._surgery.copying import copy_model
from keras_renorm.models._surgery.in_place import check_built, replace_in_place
from keras_renorm.models._surgery.translation import (
    KERAS,
    arguments_of,
    check_arguments,
    check_class,
    copy_weights,
)

# What `convert` takes itself.
_OWN = ("in_place", "layers", "model", "to")
# What a layer that stays the same object cannot change.
_FIXED = ("axis", "center", "dtype", "scale")


def convert(
    model: Any,
    to: type[BatchNormalization] = BatchRenormalization,
    *,
    layers: Choice = None,
    in_place: bool = False,
    custom_objects: Mapping[str, Callable[..., Any]] | None = None,
    **layer_arguments: Any,
) -> keras.Model:
    """A model with our layers in the place of its batch normalization.

    Its outputs in inference are those of the model, with the model's weights,
    layer names, `trainable` flags and shared layers. There are two ways.

    **A copy** (the default), of a sequential or functional model; `model` is
    not changed. Batch normalization is found in nested models, in wrappers such
    as `TimeDistributed`, and in custom layers. A copy is all that the model is:
    state besides weights (vocabularies, a stateful layer's, random
    generators'), flags of layers and of single variables, LoRA, quantization,
    the scopes that it was made in, attributes. Functions need not be
    registered. If the model is compiled, the copy is compiled alike, with a new
    optimizer; arguments of `optimizer.exclude_from_weight_decay` have to be
    given again. A functional model of a class of its own stays of that class if
    it does more than its graph (a `train_step`, a `call`), or takes `inputs`
    and `outputs`; else it becomes a plain one. Parts that a copy cannot have
    are an error.

    **In place**, of any built model: subclassed, with custom layers that make
    their normalization themselves, a backbone of keras-hub. All batch
    normalization that Keras knows of is reached: in attributes, lists and
    dicts, in wrappers, recurrent cells, nested models. The model and its layers
    stay the objects that they are: a layer turns into one of class `to`. Its
    gamma and beta stay the same variables, so that the optimizer keeps its
    state for them; its other weights are new ones. `fit`, `evaluate` and
    `predict` of all models that hold one of them are traced again. Other
    functions are not: your own `tf.function` or `jax.jit`. On JAX, layers that
    correct the gradient have weights that the optimizer must know: compile a
    model that was trained anew (a warning says so).

    **Save and load** a model that was changed in place: `save_weights`, and
    `load_weights` into one made and converted the same way, always works. Where
    the layers are in the configuration of the model (sequential, functional), a
    `.keras` file has them. The file of a class that makes its own layers says
    only how to make the model: load it in `replacing(to, ...)`, with the same
    arguments, or make the model, convert it in place and load weights. After
    `revert`, the file has Keras's layers again.

    **A model of tf_keras** (Keras 2) becomes one of Keras 3, not compiled. It
    may hold what Keras 3 has too: layers, and TensorFlow's functions that
    `keras.ops` has. All else is named in one error, and `custom_objects` has
    something in its place. If tf_keras is installed:

        inputs = tf_keras.Input((4, 2))
        x = tf_keras.layers.BatchNormalization()(inputs)
        old = tf_keras.Model(inputs, tf_keras.layers.ThresholdedReLU()(x))

        def relu(layer):
            return keras.layers.ReLU(threshold=layer.theta, name=layer.name)

        new = convert(old, custom_objects={"ThresholdedReLU": relu})

    The statistics of its renormalization are copied.

    Args:
        model: A model, built; for a copy sequential or functional.
        to: The class to convert to: `BatchRenormalization` (default) or
            `BatchNormalization`.
        layers: Which layers to convert, as for `recalibrate`. Defaults to
            `None`, for all. The others stay as they are.
        in_place: Whether to change `model` instead of making a copy. Defaults
            to `False`.
        custom_objects: For a model of tf_keras, replacements of parts that
            Keras 3 lacks, by name. For the class of a layer: a class of Keras
            3, which is made from the old layer's configuration, or a function
            from the old layer to the new one. The old layer's weights are
            copied, unless the new one is built already; Keras's batch
            normalization in it is converted, too. For a function of TensorFlow
            (`"tf.signal.fft"`): a function that takes the same arguments. For
            a function that a layer is made with (an activation, that of a
            `Lambda`): a function. Defaults to `None`.
        **layer_arguments: Arguments for each new layer, in place of the old
            layer's: `momentum=0.95`, `r_max=2.0`, `frozen_statistics=True`...
            Without them a new layer has those of the old one: a Keras layer
            with `renorm=True` gives its `renorm_clipping` as limits; a layer of
            `to` gives everything, with the step counter. Limits that none gives
            are those of a new layer; where it does not measure (another limit
            is given, or `gradient_momentum=None`) and its statistics are
            trained, they are open at once (r_max 3, d_max 5).
            No `name`, no `trainable`; with `in_place`, no `axis`, `center`,
            `scale`, `dtype`.

    Returns:
        A new model; `model` where `in_place`.

    Raises:
        TypeError: If `model` is no model, `to` is neither class, or an
            argument is of the wrong kind, or cannot change in place.
        ValueError: If the model has no batch normalization, or some of a class
            of its own; if `layers` chooses none, or layers that are not in the
            model. For a copy, if the model is neither sequential nor
            functional, or has parts that its configuration does not make anew.
            In place, if layers are not built. If a model of tf_keras has parts
            that Keras 3 lacks, or is to be changed in place or in part; if an
            argument is out of range. Nothing has changed then.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((4,)), keras.layers.BatchNormalization(),
    ... ])
    >>> converted = convert(model, momentum=0.95)
    >>> converted.layers[0].momentum
    0.95

    A subclassed model, in place:

    >>> class Net(keras.Model):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norms = [keras.layers.BatchNormalization(name="stem"),
    ...                       keras.layers.BatchNormalization(name="late")]
    ...
    ...     def call(self, x, training=None):
    ...         for norm in self.norms:
    ...             x = norm(x, training=training)
    ...         return x
    >>> net = Net()
    >>> _ = net(np.ones((8, 4)))
    >>> convert(net, layers="late", in_place=True) is net
    True
    >>> [type(norm).__name__ for norm in net.norms]
    ['BatchNormalization', 'BatchRenormalization']
    """
    check_class(to)
    check_arguments(layer_arguments, to, "convert", _OWN)
    to(**layer_arguments)  # raises before anything is built
    for name in _FIXED if check_boolean("in_place", in_place) else ():
        if name in layer_arguments:
            raise TypeError(
                f"`{name}` must not be given where in_place=True: layers keep "
                f"theirs. Received: {name}={layer_arguments[name]!r}."
            )
    if custom_objects is not None:
        _check_custom_objects(custom_objects)
    target = _Target(to, layer_arguments)
    return _converted(model, target, layers, in_place, custom_objects)


def revert(
    model: Any, *, layers: Choice = None, in_place: bool = False
) -> keras.Model:
    """A model with Keras's `BatchNormalization` for our layers.

    Its outputs in inference are those of the model, and bit for bit those of
    the Keras model that `model` was converted from. It needs no `keras_renorm`
    to load. As `convert` it makes a copy, or changes any built model in place,
    with the same weights, names, `trainable` flags, shared layers and
    compilation. In place the optimizer keeps its state (on JAX, compile anew as
    there); a copy has a new one.

    Features that Keras's layer lacks are dropped: limits and step counter,
    virtual batches, `frozen_statistics`. To train it with fixed statistics, set
    its layers' `trainable` to `False`, which fixes gamma and beta as well.

    Args:
        model: A model, for a copy sequential or functional.
        layers: Which layers, as for `convert`. Defaults to `None`, for all.
        in_place: Whether to change `model` instead of making a copy. Defaults
            to `False`.

    Returns:
        A new model; `model` where `in_place`.

    Raises:
        TypeError: As `convert`.
        ValueError: As `convert`.

    Example:

    >>> model = keras.Sequential([keras.Input((4,)), BatchRenormalization()])
    >>> type(revert(model).layers[0]) is keras.layers.BatchNormalization
    True
    """
    return _converted(model, _Target(KERAS, {}), layers, in_place)


class _Target(NamedTuple):
    """What layers turn into: a class, and arguments in place of theirs."""

    to: Any
    layer_arguments: dict[str, Any]

    def replace(
        self, layer: Any, config: dict[str, Any]
    ) -> tuple[type, dict[str, Any]]:
        """The class and the configuration of the new layer."""
        ours = self.layer_arguments
        return self.to, {**arguments_of(config, self.to, ours), **ours}

    def hand_on(self, layer: Any, new: Any) -> None:
        """Gives the new layer the weights of the old one."""
        copy_weights(layer, new)
        _open_limits(new, self.replace(layer, layer.get_config())[1])


def _check_custom_objects(custom_objects: Any) -> None:
    if not (
        isinstance(custom_objects, Mapping)
        and all(isinstance(name, str) for name in custom_objects)
        and all(map(callable, custom_objects.values()))
    ):
        raise TypeError(
            "`custom_objects` must be a dictionary from names to classes or "
            f"functions. Received: custom_objects={custom_objects!r}."
        )


def _converted(
    model: Any,
    target: _Target,
    layers: Choice,
    in_place: bool,
    custom_objects: Mapping[str, Callable[..., Any]] | None = None,
) -> keras.Model:
    check_boolean("in_place", in_place)
    if from_tf_keras.is_tf_keras(model):
        if in_place or layers is not None:
            raise ValueError(
                "`model` must be of Keras 3 to be changed in place, or in "
                "part; of tf_keras a whole copy can be made. Received: "
                f"in_place={in_place}, layers={layers!r}."
            )
        return _translated(model, target, custom_objects or {})
    if custom_objects is not None:
        raise ValueError(
            "`custom_objects` must be given with a model of tf_keras only. "
            f"Received: model={model.name}, of Keras 3."
        )
    return _with_layers(model, target, layers, in_place)


def _translated(
    model: Any,
    target: _Target,
    custom_objects: Mapping[str, Callable[..., Any]],
) -> keras.Model:
    """The copy of a model of tf_keras."""
    made = []

    def make(config: dict[str, Any]) -> Any:
        _, given = target.replace(None, config)
        made.append((target.to.from_config(given), given))
        return made[-1][0]

    new_model = from_tf_keras.translate(model, make, custom_objects)
    for layer, given in made:
        _open_limits(layer, given)
    theirs = [
        layer
        for layer in require_layers(new_model)
        if type(layer) is KERAS and target.to is not KERAS
    ]
    if theirs:  # in layers of custom_objects
        _with_layers(new_model, target, theirs, in_place=True)
    return new_model


def _with_layers(
    model: keras.Model, target: _Target, layers: Choice, in_place: bool
) -> keras.Model:
    """A model of Keras 3 with other layers: a copy, or itself."""
    chosen = require_layers(model, layers)
    foreign = [
        layer
        for layer in chosen
        if type(layer) not in (KERAS, BatchNormalization, BatchRenormalization)
    ]
    if foreign:
        raise ValueError(
            "`model` must have no batch normalization of a class of its own, "
            "whose meaning conversion would lose. Received: "
            f"{describe(foreign, model)} of class {type(foreign[0]).__name__}."
        )
    changed = [
        layer
        for layer in chosen
        if type(layer) is not target.to
        or target.layer_arguments
        or getattr(layer, "renorm", False)
    ]
    if in_place:
        check_built(model, changed)
        replace_in_place(model, changed, target.replace, target.hand_on)
        return model
    unbuilt = [layer for layer in changed if not layer.built]
    new_model, copies = copy_model(model, unbuilt, target.replace)
    missed = [layer for layer in changed if id(layer) not in copies]
    if missed:
        raise ValueError(
            "`model` must call all batch normalization that it has: a copy of "
            f"a {type(model).__name__} is its graph, without the rest. Leave "
            "it out with `layers`, or use in_place=True. Received: model="
            f"{model.name}, which does not call {describe(missed)}."
        )
    built = [copies[id(layer)] for layer in changed if layer.built]
    replace_in_place(new_model, built, target.replace, target.hand_on, kept=())
    return new_model


def _open_limits(layer: Any, given: dict[str, Any]) -> None:
    """Opens limits that nobody gave, where the statistics know the data.

    The ramp of a new layer waits for that. Where a gate rules it stays: the
    data may be another domain's, which a gate does not tell from noise.
    """
    if (
        not isinstance(layer, BatchRenormalization)
        or layer.is_gated
        or is_untrained(layer)
    ):
        return
    ramps = schedules.default_limits(layer.momentum)
    for name, ramp in zip(("r_max", "d_max"), ramps, strict=True):
        if name not in given:
            setattr(layer, name, ramp.final_value)
