"""Copies of models are what the models are, in all that can be seen."""

import enum
import functools

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import BatchRenormalization, convert, fold, revert
from tests import helpers, networks, zoo

KERAS = layers.BatchNormalization
pytestmark = pytest.mark.filterwarnings("ignore:.* have a `quantize` method")


# What Keras cannot train, or not twice the same.
CANNOT_TRAIN = {
    "tensorflow": [zoo.recomputed],  # gradients with keywords
    "jax": [zoo.recomputed],
    # `steps_per_execution` warns of few batches; dropout without a seed.
    "torch": [zoo.compiled, zoo.recurrent],
}


def there_and_back(model):
    return revert(convert(model))


def changed_in_place(model):
    model = revert(model)  # a copy
    return revert(convert(model, in_place=True), in_place=True)


def assert_same(one, other):
    """Of two models, all that `zoo.seen` sees."""
    differences = {
        key: (one.get(key, "absent"), other.get(key, "absent"))
        for key in one.keys() | other.keys()
        if str(one.get(key)) != str(other.get(key))
    }
    assert not differences


def in_any_order(seen):
    return {
        key: sorted(value, key=str) if isinstance(value, list) else value
        for key, value in seen.items()
    }


@pytest.mark.parametrize("way", [revert, there_and_back, changed_in_place])
@pytest.mark.parametrize("kind", zoo.ALL)
def test_everything_is_as_it_was(kind, way, rng):
    model = networks.randomize(zoo.make(kind), rng)
    before = zoo.seen(model)
    copy = way(model)
    after = zoo.seen(copy)
    if kind.__name__ in zoo.ANY_ORDER:
        before, after = map(in_any_order, (before, after))
    assert_same(before, after)
    x = networks.data_of(model, rng)
    for one, two in zip(
        keras.tree.flatten(model(x)), keras.tree.flatten(copy(x)), strict=True
    ):
        helpers.assert_close(two, helpers.to_numpy(one), 1e-6)


@pytest.mark.parametrize("kind", zoo.ALL)
def test_copies_train_as_the_models_do(kind, rng):
    if kind in CANNOT_TRAIN.get(keras.backend.backend(), []):
        pytest.skip("see there")
    model = networks.randomize(zoo.make(kind), rng)
    copy = there_and_back(model)
    x = networks.data_of(model, rng)
    y = keras.tree.map_structure(
        lambda values: np.ones(values.shape, "float32"), model(x)
    )
    copy(x)  # stateful, as the model is
    for each in (model, copy):
        if not each.compiled:
            each.compile("sgd", "mse")
        each.fit(x, y, epochs=2, verbose=0, shuffle=False)
    ones, others = (
        [
            (variable.path, helpers.to_numpy(variable))
            for variable in each.trainable_variables
        ]
        for each in (model, copy)
    )
    if kind.__name__ in zoo.ANY_ORDER:
        ones, others = (sorted(each, key=str) for each in (ones, others))
    for (path, value), (other_path, other) in zip(ones, others, strict=True):
        assert path == other_path
        helpers.assert_close(other, value, 1e-5)
    for one, other in zip(
        model.non_trainable_variables,
        copy.non_trainable_variables,
        strict=True,
    ):
        helpers.assert_close(other, helpers.to_numpy(one), 1e-5)


def test_a_discriminator_trains_on_in_the_copy(rng):
    """In turns: alone, and fixed in the whole."""
    whole = convert(zoo.generative())
    discriminator = whole.layers[-1]
    discriminator.trainable = True
    x, y = helpers.inputs_of(rng, (4, 4)), np.ones((4, 3), "float32")
    before = helpers.to_numpy(discriminator.layers[0].kernel)
    discriminator.train_on_batch(x, y)
    discriminator.trainable = False
    whole.train_on_batch(np.ones((4, 2), "float32"), y)
    after = helpers.to_numpy(discriminator.layers[0].kernel)
    assert not np.array_equal(before, after)


@pytest.mark.tensorflow
@pytest.mark.torch
def test_steps_of_a_class_of_its_own_are_the_copys(rng):
    model = zoo.own_class()
    for function in (revert, convert, fold):
        copy = function(model)
        assert type(copy) is zoo.Own
        x = networks.data_of(model, rng)
        results = copy.evaluate(x, np.ones((4, 3)), return_dict=True, verbose=0)
        assert results == {"mean": 7.0}
        assert copy.features is copy.layers[1]
        assert copy.tracker is not model.tracker
        assert copy.first_optimizer is not model.first_optimizer
        assert float(copy.second_optimizer.learning_rate) == pytest.approx(0.2)


def test_a_class_that_takes_no_graph_becomes_a_plain_model():
    plain = type(networks.shared(KERAS))
    assert type(convert(networks.Backbone(KERAS))) is plain


def test_layers_that_a_custom_layer_makes_are_reached(rng):
    model = keras.Sequential(
        [keras.Input((4,)), networks.Sealed(), zoo.Residual()]
    )
    networks.randomize(model, rng)
    copy = convert(model, r_max=2.0)
    again = convert(copy, momentum=0.5)
    for each in (copy, again):
        for layer in networks.normalizations(each):
            assert type(layer) is BatchRenormalization
            assert layer.r_max == 2.0
    x = networks.data_of(model, rng)
    for each in (copy, again, revert(again)):
        helpers.assert_close(each(x), helpers.to_numpy(model(x)), 1e-6)
    assert {type(each) for each in networks.normalizations(model)} == {KERAS}


def unbuilt(*parts):
    return keras.Sequential([layers.Dense(3), *parts])


def test_models_that_are_not_built(rng):
    model = unbuilt(KERAS(name="bn", momentum=0.7))
    copy = convert(model, r_max=2.0)
    x = helpers.inputs_of(rng, (8, 4))
    copy(x, training=True)
    layer = copy.get_layer("bn")
    assert (layer.momentum, layer.r_max, layer.current_step()) == (0.7, 2.0, 1)
    reverted = revert(unbuilt(BatchRenormalization(name="bn")))
    reverted(x, training=True)
    assert len(reverted.get_layer("bn").weights) == 4
    with pytest.raises(ValueError, match="with the layers sealed_bn not built"):
        convert(unbuilt(networks.Sealed()))


def test_normalization_that_a_plain_copy_does_not_have():
    model = networks.Backbone(KERAS, name="backbone")
    model.spare = KERAS(name="spare")
    model.spare.build((None, 3))
    if len(networks.normalizations(model)) == 1:
        pytest.skip("Keras did not see such an attribute in early versions")
    message = (
        "`model` must call all batch normalization that it has: a copy of a "
        "Backbone is its graph, without the rest. Leave it out with `layers`, "
        "or use in_place=True. Received: model=backbone, which does not call "
        "spare."
    )
    with helpers.raises(ValueError, message):
        convert(model)
    (layer,) = networks.normalizations(convert(model, layers="stem_bn"))
    assert type(layer) is BatchRenormalization


class Attached(keras.Model):
    def train_step(self, data):
        return super().train_step(data)


def patched():
    model = zoo.small()
    head = model.layers[2]
    head.call = lambda inputs: 2.0 * inputs @ head.kernel
    return model


def with_a_tensor_of_the_graph():
    inputs = keras.Input((4,))
    x = KERAS()(inputs)
    model = Attached(inputs, layers.Dense(2)(x))
    model.feature = x
    return model


def in_two_places():
    inputs = keras.Input((5, 4))
    dense = layers.Dense(4)
    x = KERAS()(dense(inputs))
    return keras.Model(inputs, layers.TimeDistributed(dense)(x))


class NoConfig(layers.Layer):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def call(self, inputs):
        return self.part(inputs)


def without_configuration():
    return keras.Sequential(
        [keras.Input((4,)), NoConfig(layers.Dense(4)), KERAS()]
    )


NOT_MADE_ANEW = (
    "`model` must have layers that their configuration makes anew, with the "
    "same weights, and what they hold must be in one place "
    "(`keras_renorm.convert` and `keras_renorm.revert` change any model with "
    "in_place=True). Received: layer {name} of class {kind}."
)
NOT_HANDED_ON = (
    "`model` must have no layers with attributes that a copy cannot have "
    "(`keras_renorm.convert` and `keras_renorm.revert` change any model with "
    "in_place=True). Received: layer {name} of class {kind}, with {attribute}."
)


class Kind(enum.Enum):
    PLAIN = 1
    TRIPLE = 3


def triple(x):
    return 3.0 * x


def scaled(factor):
    return lambda x: factor * x


class Hooked(layers.Layer):
    """What it computes is set after it is made."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.dense = layers.Dense(4)
        self.hook = None
        self.hooks = []
        self.scaled = scaled(1.0)
        self.kind = Kind.PLAIN
        self.tags = set()
        self.by_name = {"own": lambda x: self.dense(x)}
        self.offset = keras.ops.zeros((4,))

    def build(self, input_shape):
        self.dense.build(input_shape)

    def call(self, inputs):
        x = self.by_name["own"](self.scaled(inputs)) + self.offset
        for hook in [*self.hooks, *([self.hook] if self.hook else [])]:
            x = hook(x)
        if "shift" in self.tags:
            x = x + 1.0
        if "more" in self.by_name:
            x = self.by_name["more"](x)
        return x * self.kind.value


def hold_itself(layer):
    layer.hook = lambda x: layer.dense(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "hook", triple),
        lambda layer: setattr(layer, "hook", keras.ops.tanh),
        lambda layer: setattr(
            layer, "hook", functools.partial(keras.ops.clip, x_min=0, x_max=1)
        ),
        lambda layer: setattr(layer, "hook", layer.dense),
        lambda layer: layer.hooks.append(triple),
        lambda layer: layer.hooks.append(functools.partial(layer.dense)),
        lambda layer: setattr(layer, "scaled", scaled(3.0)),
        lambda layer: setattr(layer, "kind", Kind.TRIPLE),
        lambda layer: layer.tags.add("shift"),
        lambda layer: layer.by_name.update({"more": triple}),
        lambda layer: setattr(layer, "offset", keras.ops.ones((4,))),
        hold_itself,
    ],
)
def test_what_is_set_later_is_handed_on(change, rng):
    layer = Hooked()
    model = keras.Sequential([keras.Input((4,)), KERAS(), layer])
    x = networks.data_of(model, rng)
    before = helpers.to_numpy(model(x))
    change(layer)
    expected = helpers.to_numpy(layer(model.layers[0](x)))
    assert not np.allclose(before, expected)
    copy = convert(model)
    # Nothing in the copy is the model's.
    layer.dense.kernel.assign(np.zeros((4, 4)))
    helpers.assert_close(copy(x), expected, 1e-5)


class Last(layers.Layer):
    """Keeps what a call left: of the model's graph, none of the copy's."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.last, self.all = None, []

    def compute_output_spec(self, inputs):
        self.all.append(inputs)
        self.last = inputs
        return keras.KerasTensor(inputs.shape, inputs.dtype)

    def call(self, inputs):
        self.all.append(inputs)
        self.last = inputs
        return inputs


def test_what_calls_leave_is_no_error(rng):
    model = keras.Sequential([keras.Input((4,)), KERAS(), Last()])
    for x in (networks.data_of(model, rng), keras.Input((4,))):
        model(x)
        convert(model)


FUNCTIONS = {"triple": triple, "tanh": keras.ops.tanh}


class Named(layers.Layer):
    """Its configuration holds names, its attributes the functions."""

    def __init__(self, act="tanh", acts=("triple",), factor=None, **arguments):
        super().__init__(**arguments)
        self.given = {"act": act, "acts": list(acts), "factor": factor}
        self.act = FUNCTIONS[act]
        self.acts = [FUNCTIONS[name] for name in acts]
        self.factor = scaled(**factor)

    def call(self, inputs):
        x = self.factor(self.act(inputs))
        for act in self.acts:
            x = act(x)
        return x

    def get_config(self):
        return {**super().get_config(), **self.given}

    def compute_output_shape(self, input_shape):
        return input_shape


class TakesFunctions(layers.Layer):
    """What it writes down makes none."""

    def __init__(self, act, **arguments):
        super().__init__(**arguments)
        self.act = keras.activations.get(act)

    def call(self, inputs):
        return self.act(inputs)

    def get_config(self):
        return {**super().get_config(), "act": self.act.__name__}

    def compute_output_shape(self, input_shape):
        return input_shape


def relu(x):
    """Of another function's name."""
    return 2.0 * x


@pytest.mark.parametrize(
    "layer",
    [
        lambda: Named("triple", ("tanh", "triple"), {"factor": 2.0}),
        lambda: layers.TimeDistributed(Named(factor={"factor": 2.0})),
        lambda: TakesFunctions(triple),
        lambda: layers.TimeDistributed(TakesFunctions(triple)),
        lambda: TakesFunctions(relu),
        lambda: layers.Activation(relu),
    ],
)
def test_functions_that_a_configuration_names(layer, rng):
    model = keras.Sequential([keras.Input((3, 4)), KERAS(), layer()])
    x = networks.data_of(model, rng)
    helpers.assert_close(convert(model)(x), helpers.to_numpy(model(x)), 1e-5)


class NoMetric(keras.metrics.Mean):
    def __init__(self, factor):
        super().__init__(name="mine")


class NoOptimizer(keras.optimizers.SGD):
    def __init__(self, factor):
        super().__init__(factor, name="mine")


@pytest.mark.parametrize("kind", [NoMetric, NoOptimizer])
def test_what_was_compiled_without_a_configuration(kind):
    model = zoo.small()
    if kind is NoMetric:
        model.compile("sgd", "mse", metrics=[kind(0.1)])
    else:
        model.compile(kind(0.1), "mse")
    message = (
        "`model` must have metrics and optimizers that their configuration "
        "makes anew: give the class a `get_config` of all that its "
        "constructor takes, or compile the model without "
        "(`keras_renorm.convert` and `keras_renorm.revert` change any model "
        f"with in_place=True). Received: mine of class {kind.__name__}."
    )
    with helpers.raises(ValueError, message):
        convert(model)


def policies(default):
    policy = keras.dtype_policies.DTypePolicyMap(default)
    for name in ("bn", "head"):
        policy[name] = keras.dtype_policies.DTypePolicy("mixed_bfloat16")
    return policy


@pytest.mark.parametrize("default", ["float32", None])
@pytest.mark.parametrize(
    "way", [revert, there_and_back, changed_in_place, fold]
)
def test_maps_of_policies(way, default, rng):
    """A layer has the policy of its path."""
    policy = policies(default)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(4, name="dense", dtype=policy),
            KERAS(name="bn", dtype=policy),
            layers.Dense(2, name="head", dtype=policy),
        ]
    )
    copy = way(model)
    x = networks.data_of(model, rng)
    for layer in copy.layers:
        expected = model.get_layer(layer.name)
        assert layer.compute_dtype == expected.compute_dtype
        assert type(layer.dtype_policy) is type(policy)
    expected = helpers.to_numpy(keras.ops.cast(model(x), "float32"))
    actual = keras.ops.cast(copy(x), "float32")
    helpers.assert_close(actual, expected, 0.02)


@pytest.mark.parametrize(
    ("make", "message", "at", "attribute"),
    [
        (patched, NOT_HANDED_ON, -1, "call"),
        (with_a_tensor_of_the_graph, NOT_HANDED_ON, None, "feature"),
        (in_two_places, NOT_MADE_ANEW, -1, None),
        (without_configuration, NOT_MADE_ANEW, 0, None),
    ],
)
def test_what_a_copy_cannot_have_is_an_error(make, message, at, attribute, rng):
    model = make()
    layer = model if at is None else model.layers[at]
    message = message.format(
        name=layer.name,
        kind=type(layer).__name__,
        attribute=attribute and f"{attribute}={getattr(layer, attribute)!r}",
    )
    for function in (convert, revert, fold):
        with helpers.raises(ValueError, message):
            function(model)
    x = networks.data_of(model, rng)
    expected = helpers.to_numpy(model(x))
    convert(model, in_place=True)
    helpers.assert_close(model(x), expected, 1e-5)
