"""The copy of a model: layers made anew, and handed all that they were."""

import functools
import types
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import keras

from keras_renorm.models._layers.configuration import (
    Configurations,
    is_of_keras,
    not_made_anew,
)
from keras_renorm.models._layers.finding import (
    describe,
    find_layers,
    has_graph,
    inside,
)
from keras_renorm.models._layers.state import (
    NoConfigurationError,
    adapt_alike,
    copy_state,
    copy_variable,
    hand_on,
)
from keras_renorm.models._surgery.in_place import (
    Replace,
    check_built,
    replace_in_place,
)
from keras_renorm.models._surgery.translation import KERAS
from keras_renorm.models.replacing import as_asked

# The behavior of a model beside its computation; a class that overrides one of
# these is more than its graph.
_BEHAVIOUR = set(dir(keras.Model)) - set(dir(keras.layers.Layer)) | {"call"}
# Not the descriptions that such a class gives of itself.
_BEHAVIOUR -= {"get_quantization_layer_structure", "layers", "summary"}
# Keras's objects that hold variables, beside layers.
_STATEFUL = (
    keras.metrics.Metric,
    keras.optimizers.Optimizer,
    keras.random.SeedGenerator,
)


def check_has_graph(model: Any) -> None:
    """Raises if no copy of a model can be made."""
    if has_graph(model):
        return
    held = find_layers(model, keras.layers.BatchNormalization)
    layers = f", with the layers {describe(held)}" if held else ""
    raise ValueError(
        "`model` must be a sequential or a functional model: of another no "
        "copy with other layers can be made (`keras_renorm.convert` changes "
        "any with in_place=True). Received: model="
        f"{model.name}, of class {type(model).__name__}{layers}."
    )


def copy_model(
    model: keras.Model,
    layers: Sequence[Any] = (),
    replace: Replace = lambda layer, config: (type(layer), config),
    dropped: Collection[int] = (),
) -> tuple[keras.Model, dict[int, Any]]:
    """A copy of a sequential or functional model.

    Layers are made of their configurations, as Keras makes them: in nested
    models, wrappers and custom layers, shared where they are shared, and in the
    scope of the model's strategy. What the configuration does not say is handed
    on (`state.hand_on`): weights and other state, names, flags, attributes.
    Functions that the model was made or compiled with are the copy's too: no
    file is written, so none need be registered. If a model is compiled, its
    copy is compiled alike, with a new optimizer.

    A functional model of a class of its own stays of that class where its
    configuration describes its graph, or where it does more than its graph: has
    a `train_step` or a `call` of its own. Another becomes a plain one.

    Args:
        model: The model; it is not changed.
        layers: Layers in its graph, or in that of a nested model, whose copies
            are others; they get no weights.
        replace: From such a layer and its configuration to the class and the
            configuration of its copy.
        dropped: The `id` of layers to leave out. Each must be called once, in
            a graph, with one tensor. One that makes an output of a graph
            becomes an `Identity`, so that the output keeps its name; one whose
            outputs are of another type than its inputs too.

    Returns:
        `(copy, copies)`: the model, and for the `id` of each layer of the old
        one the layer in its place.

    Raises:
        ValueError: If the model has no graph, or something that cannot be
            handed on, or if one of `layers` is in no graph.
    """
    check_has_graph(model)
    strategy = getattr(model, "distribute_strategy", None)
    with as_asked(), strategy.scope() if strategy else nullcontext():
        return _Copying(model, layers, replace, dropped).run()


class _Copying:
    def __init__(
        self,
        model: keras.Model,
        layers: Sequence[Any],
        replace: Replace,
        dropped: Collection[int],
    ) -> None:
        self._model = model
        self._layers = {id(layer): layer for layer in layers}
        self._replace = replace
        self._dropped = dropped
        # By the `id` of those layers, arguments that their copies have.
        self._changed: dict[int, dict[str, Any]] = {}
        self._configurations = Configurations()
        # By the `id` of the old object; across nested models, so that what they
        # share they share.
        self._copies: dict[int, Any] = {}
        # By their own `id`, layers that take the place of dropped ones, and
        # whether they stay.
        self._stand_ins: dict[int, bool] = {}
        self._all_are_known = False

    def run(self) -> tuple[keras.Model, dict[int, Any]]:
        new_model = self._copy(self._model)
        held = find_layers(self._model, keras.layers.Layer)
        for layer in held:
            if id(layer) in self._copies and not has_graph(layer):
                self._pair_contents(layer)
        pairs = [
            (layer, self._copies[id(layer)])
            for layer in held
            if id(layer) in self._copies and id(layer) not in self._dropped
        ]
        self._all_are_known = True
        check_built(
            self._model,
            [
                layer
                for key, layer in self._layers.items()
                if key not in self._changed
            ],
        )
        for old, new in pairs:
            if old.built and not new.built:
                new.build_from_config(old.get_build_config())
        self._turn(new_model, pairs)
        for old, new in pairs:
            # Containers come before what they hold, and all layers before
            # variables, which may have flags of their own.
            new.trainable = old.trainable
        for old, new in pairs:
            if isinstance(old, keras.Model) and old.compiled:
                self._compile_alike(old, new)
            adapt_alike(old, new)
            changed = self._changed.get(id(old), {})
            hand_on(old, new, self._counterpart, changed)
            if id(old) not in self._changed:
                copy_state(old, new)
        return new_model, self._copies

    def _copy(self, layer: Any) -> Any:
        if id(layer) not in self._copies:
            if self._all_are_known:
                raise LookupError(layer.name)
            new = self._clone(layer) if has_graph(layer) else self._made(layer)
            self._copies[id(layer)] = new
            if has_graph(layer):
                # A `call` of its own may need it at once.
                hand_on(layer, new, self._counterpart)
        return self._copies[id(layer)]

    def _made(self, layer: Any) -> Any:
        if id(layer) in self._dropped:
            return keras.layers.Identity(
                name=layer.name, dtype=layer.compute_dtype
            )
        if not isinstance(layer, keras.layers.Layer):  # an operation: x + y
            new = type(layer).from_config(layer.get_config())
            hand_on(layer, new, self._counterpart)
            return new
        try:
            if id(layer) not in self._layers:
                return self._configurations.alike(layer)
            config = self._configurations.read(layer)
            kind, changed = self._replace(layer, config)
            self._changed[id(layer)] = changed
            return self._configurations.make(kind, changed)
        except (NotImplementedError, TypeError) as error:  # of the user's
            raise not_made_anew(layer) from error

    def _call(self, layer: Any, *arguments: Any, **named: Any) -> Any:
        if id(layer) not in self._stand_ins:
            return layer(*arguments, **named)
        stays = self._stand_ins[id(layer)]
        return layer(arguments[0]) if stays else arguments[0]

    def _clone(self, nested: keras.Model) -> keras.Model:
        if isinstance(nested, keras.Sequential):
            kept = [
                self._copy(layer)
                for layer in nested.layers
                if id(layer) not in self._dropped or _changes_type(layer)
            ]
            if hasattr(nested, "inputs"):
                kept = [self._inputs_of(nested, nested.inputs[0]), *kept]
            new: keras.Model = keras.Sequential(kept, name=nested.name)
        else:
            # Not `layer.output`, which is that of its first call: of another
            # graph, it may be.
            for layer in nested.layers:
                if id(layer) in self._dropped:
                    self._stand_ins[id(self._copy(layer))] = (
                        layer.name in nested.output_names
                        or _changes_type(layer)
                    )
            # Its graph alone: the constructor of a class of its own may take
            # other arguments, and what is compiled is cloned by names.
            new = keras.models.clone_model(
                graph_of(nested),
                input_tensors=self._inputs_of(nested, nested.input),
                clone_function=self._copy,
                call_function=self._call,
            )
        if _is_more_than_its_graph(type(nested)) or _tells_its_graph(nested):
            new.__class__ = type(nested)
        return new

    def _inputs_of(self, model: keras.Model, inputs: Any) -> Any:
        """Inputs for a copy of a model.

        Of the same names: those that `clone_model` makes have their tensors'.
        """
        layers = {
            id(layer.output): layer
            for layer in find_layers(model, keras.layers.InputLayer)
        }
        return keras.tree.map_structure(
            lambda tensor: self._copy(layers[id(tensor)]).output, inputs
        )

    def _pair_contents(self, layer: Any) -> None:
        """Finds the copies of the layers inside a wrapper or custom layer."""
        old, new = inside(layer), inside(self._copies[id(layer)])
        if [_kind_of(held) for held in old] != [_kind_of(held) for held in new]:
            raise not_made_anew(layer)
        for before, after in zip(old, new, strict=True):
            if self._copies.setdefault(id(before), after) is not after:
                raise not_made_anew(layer)  # elsewhere too: shared

    def _turn(
        self, model: keras.Model, pairs: Sequence[tuple[Any, Any]]
    ) -> None:
        """Of layers that make their normalization themselves, lets it turn.

        They make the same class always, and it may have been turned into
        another since.
        """
        turned = [
            (old, new)
            for old, new in pairs
            if type(new) is not type(old)
            and _kind_of(new) is KERAS
            and id(old) not in self._changed
        ]
        check_built(self._model, [old for old, _ in turned])
        replace_in_place(
            model,
            [new for _, new in turned],
            lambda old, config: (type(old), config),
            lambda layer, new: None,
            kept=(),
            sources=[old for old, _ in turned],
        )

    def _compile_alike(self, old: keras.Model, new: keras.Model) -> None:
        # `get_compile_config` has names only, and nothing public the functions.
        given = {**old._compile_config.config, "optimizer": old.optimizer}
        # Not the `compile` of a class of its own, which may take others.
        keras.Model.compile(new, **self._counterpart(given))

    def _counterpart(self, value: Any) -> Any:
        """The object of the copy in the place of one of the model."""
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(self._counterpart, value))
        if isinstance(value, list | tuple | set | frozenset):
            # (A list of TensorFlow takes no iterator.)
            return type(value)([self._counterpart(part) for part in value])
        if isinstance(value, dict):
            return {key: self._counterpart(part) for key, part in value.items()}
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            function, arguments, named = self._counterpart(parts)
            return type(value)(function, *arguments, **named)
        if isinstance(value, keras.layers.Layer):
            return self._copy(value)
        if isinstance(value, keras.KerasTensor):
            raise LookupError(value.name)
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, _STATEFUL):
            new = self._alike(value)
        elif isinstance(value, types.FunctionType):
            return self._function(value)
        elif isinstance(value, keras.Variable):
            new = copy_variable(value)
        elif isinstance(value, types.MethodType):
            owner = self._counterpart(value.__self__)
            return types.MethodType(value.__func__, owner)
        else:
            return value
        self._copies[id(value)] = new
        return new

    def _alike(self, value: Any) -> Any:
        try:
            return self._configurations.alike(value)
        except Exception as error:  # of the user's
            raise NoConfigurationError(
                "`model` must have metrics and optimizers that their "
                "configuration makes anew: give the class a `get_config` of "
                "all that its constructor takes, or compile the model "
                "without (`keras_renorm.convert` and `keras_renorm.revert` "
                "change any model with in_place=True). Received: "
                f"{value.name} of class {type(value).__name__}."
            ) from error

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """A function; where it holds layers that are copied, with theirs."""
        cells = function.__closure__ or ()
        held = [getattr(cell, "cell_contents", None) for cell in cells]
        if not any(id(part) in self._copies for part in held):
            return function
        new = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(
                types.CellType(self._copies[id(part)])
                if id(part) in self._copies
                else cell
                for cell, part in zip(cells, held, strict=True)
            ),
        )
        new.__kwdefaults__ = function.__kwdefaults__
        return new


def _kind_of(layer: Any) -> type:
    return KERAS if isinstance(layer, KERAS) else type(layer)


def _changes_type(layer: Any) -> bool:
    """Of a layer in a graph: float32 between layers of float16."""
    inputs, *_ = keras.tree.flatten(layer.input)  # in a sequence, the mask too
    return inputs.dtype != layer.output.dtype


def graph_of(model: keras.Model) -> keras.Model:
    """The graph of a functional model, without a class of its own."""
    return keras.Model(model.input, model.output, name=model.name)


def _is_more_than_its_graph(kind: type) -> bool:
    return any(
        name in vars(parent) and not is_of_keras(parent)
        for parent in kind.__mro__
        for name in _BEHAVIOUR
    )


def _tells_its_graph(model: Any) -> bool:
    """Whether Keras makes such a model of a graph, from files too."""
    return is_of_keras(model.get_config) and is_of_keras(type(model).__init__)
