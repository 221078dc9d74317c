"""Layers that turn into others, in a model that stays the same object."""

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    diagnostics,
    freeze_statistics,
    recalibrate,
    replacing,
    revert,
)
from tests import helpers, networks
from tests.test_nested import Cell

KERAS = layers.BatchNormalization
# On JAX, Keras's `fit` leaks a tracer of its own layer in a recurrent cell.
IS_RECURRENT = keras.backend.backend() == "tensorflow"
PLACES = 7 + IS_RECURRENT
OURS = [BatchNormalization, BatchRenormalization]


@keras.saving.register_keras_serializable(package="tests")
class Places(keras.Model):
    """Normalization in every place that a subclassed model may have."""

    def __init__(self, bn=KERAS, **arguments):
        super().__init__(**arguments)
        self.attribute = bn(name="bn")
        self.listed = [bn(name="bn"), bn(name="bn", momentum=0.8)]
        self.named = {"a": bn(name="in_dict", center=False), "none": None}
        self.both = (bn(name="in_tuple"), layers.Dense(4, name="dense"))
        self.sealed = layers.TimeDistributed(Sealed(bn), name="sealed")
        self.graph = keras.Sequential(
            [keras.Input((4,)), layers.Dense(4), bn(name="in_graph")]
        )
        if IS_RECURRENT:
            self.recurrent = layers.RNN(Cell(bn), return_sequences=True)

    def build(self, input_shape):
        for each in (self.attribute, *self.listed, *self.both):
            each.build(input_shape)
        self.named["a"].build(input_shape)
        self.sealed.build((None, 3, 4))
        if IS_RECURRENT:
            self.recurrent.build((None, 3, 4))

    def call(self, inputs, training=None):
        x = self.attribute(inputs, training=training)
        for each in self.listed:
            x = each(x, training=training)
        x = self.named["a"](x, training=training)
        x = self.both[1](self.both[0](x, training=training))
        x = self.graph(x, training=training)
        x = keras.ops.stack([x, 2 * x, x - 1], axis=1)
        x = self.sealed(x, training=training)
        if IS_RECURRENT:
            x = self.recurrent(x, training=training)
        return x[:, -1]

    def get_config(self):
        return {"name": self.name}


class Sealed(layers.Layer):
    """A custom layer that makes its normalization itself."""

    def __init__(self, bn=KERAS):
        super().__init__()
        self.hidden = [bn(name="sealed_bn")]

    def build(self, input_shape):
        self.hidden[0].build(input_shape)

    def call(self, inputs, training=None):
        return self.hidden[0](inputs, training=training)


def places(rng, bn=KERAS):
    """Such a model, built, with random values, and inputs."""
    model = Places(bn, name="places")
    x = helpers.inputs_of(rng, (16, 4))
    model(x)
    return networks.randomize(model, rng), x


def values(layer):
    return {weight.name: helpers.to_numpy(weight) for weight in layer.variables}


@pytest.mark.slow
@pytest.mark.parametrize("to", OURS)
def test_every_place_is_reached_and_everything_stays(to, rng):
    model, x = places(rng)
    model.compile("adam", "mse")
    model.fit(x, x, verbose=0)
    olds = networks.normalizations(model)
    assert len(olds) == PLACES
    expected = model.predict(x, verbose=0)
    before = [values(layer) for layer in olds]
    configs = [layer.get_config() for layer in olds]
    trained = [(id(v), v.path) for v in model.trainable_variables]
    paths = [v.path for v in model.variables]
    state = [helpers.to_numpy(v) for v in model.optimizer.variables]

    assert convert(model, to, in_place=True) is model
    news = networks.normalizations(model)
    assert [id(layer) for layer in news] == [id(layer) for layer in olds]
    assert {type(layer) for layer in news} == {to}
    for layer, weights, config in zip(news, before, configs, strict=True):
        fresh = to.from_config(layer.get_config())
        fresh.build((None, 4))
        assert [v.name for v in layer.variables] == [
            v.name for v in fresh.variables
        ]
        assert vars(layer).keys() == vars(fresh).keys()
        assert {v.path for v in layer.variables} == {
            f"{layer.path}/{v.name}" for v in layer.variables
        }
        for name, value in weights.items():
            assert np.array_equal(values(layer)[name], value), name
        for name, value in layer.get_config().items():
            assert value == config.get(name, value), name
        with pytest.raises(ValueError, match="cannot add new elements"):
            layer.another = keras.Variable(0.0)
    helpers.assert_close(model.predict(x, verbose=0), expected, 1e-6)
    assert trained == [(id(v), v.path) for v in model.trainable_variables]
    for old, variable in zip(state, model.optimizer.variables, strict=True):
        assert np.array_equal(old, helpers.to_numpy(variable))
    assert model.loss == "mse"

    model.fit(x, x, verbose=0)
    assert int(model.optimizer.iterations) == 2
    if to is BatchRenormalization:
        # In the wrapper and the cell once a time step, and more.
        assert sorted(layer.current_step() for layer in news)[:6] == [1] * 6
    expected = model.predict(x, verbose=0)
    assert revert(model, in_place=True) is model
    assert [id(layer) for layer in olds] == [
        id(layer) for layer in networks.normalizations(model)
    ]
    assert {type(layer) for layer in olds} == {KERAS}
    helpers.assert_close(model.predict(x, verbose=0), expected, 1e-6)
    assert [v.path for v in model.variables] == paths
    assert [layer.get_config() for layer in olds] == configs
    model.fit(x, x, verbose=0)
    assert int(model.optimizer.iterations) == 3


def test_there_and_back_is_the_same_to_the_bit(rng):
    model, x = places(rng)
    before = [helpers.to_numpy(v) for v in model.variables]
    expected = model.predict(x, verbose=0)
    revert(convert(model, in_place=True), in_place=True)
    assert np.array_equal(model.predict(x, verbose=0), expected)
    for old, variable in zip(before, model.variables, strict=True):
        assert np.array_equal(old, helpers.to_numpy(variable))


@pytest.mark.parametrize("network", networks.ALL)
def test_models_with_a_graph(network, rng, tmp_path):
    model = networks.randomize(network(KERAS), rng)
    x = networks.data_of(model, rng)
    trainable = [layer.trainable for layer in model._flatten_layers()]
    expected = networks.outputs_of(model, x)
    convert(model, in_place=True)
    assert {type(each) for each in networks.normalizations(model)} == {
        BatchRenormalization
    }
    assert trainable == [layer.trainable for layer in model._flatten_layers()]
    for one, two in zip(expected, networks.outputs_of(model, x), strict=True):
        helpers.assert_close(two, one, 1e-6)
    # A class that makes its own layers; what Keras cannot load itself.
    if network not in (
        networks.backbone,
        networks.nested,
        networks.partly_frozen,
    ):
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        for one, two in zip(
            networks.outputs_of(model, x),
            networks.outputs_of(loaded, x),
            strict=True,
        ):
            assert np.array_equal(one, two)
        copy = revert(model)
        for one, two in zip(
            expected, networks.outputs_of(copy, x), strict=True
        ):
            assert np.array_equal(one, two)


@pytest.mark.slow
def test_training_is_that_of_a_model_made_with_these_layers(rng):
    model, x = places(rng)
    other, _ = places(rng, BatchRenormalization)
    for old, new in zip(
        networks.normalizations(model),
        networks.normalizations(other),
        strict=True,
    ):
        given = old.get_weights()
        new.set_weights([*given, *new.get_weights()[len(given) :]])
    for name in ("both", "graph"):
        pairs = [
            each.layers if name == "graph" else each
            for each in (getattr(model, name), getattr(other, name))
        ]
        for old, new in zip(*pairs, strict=True):
            if isinstance(old, layers.Dense):
                new.set_weights(old.get_weights())
    convert(model, in_place=True)
    for each in (model, other):
        each.compile("sgd", "mse")
        each.fit(x, x, epochs=3, verbose=0, shuffle=False)
    helpers.assert_close(
        model.predict(x, verbose=0), other.predict(x, verbose=0), 1e-5
    )
    for old, new in zip(
        networks.normalizations(model),
        networks.normalizations(other),
        strict=True,
    ):
        for name, value in values(new).items():
            helpers.assert_close(values(old)[name], value, 1e-5)


def test_what_was_traced_is_traced_anew(rng):
    """In `fit`, `evaluate` and `predict`, of nested models too."""
    model, x = places(rng)
    model.compile("sgd", "mse")
    model.predict(x, verbose=0)
    model.graph.predict(x, verbose=0)
    model.evaluate(x, x, verbose=0)
    convert(model, in_place=True, gradient_momentum=None)
    # As a layer that stands, the moving mean is seen by all of them.
    for layer in networks.normalizations(model):
        layer.moving_mean.assign(layer.moving_mean + 1.0)
    for each in (model, model.graph):
        helpers.assert_close(
            each.predict(x, verbose=0), each(x, training=False), 1e-5
        )
    loss = np.mean((helpers.to_numpy(model(x)) - x) ** 2)
    helpers.assert_close(model.evaluate(x, x, verbose=0), loss, 1e-5)


def test_weights_that_do_not_train_still_do_not(rng):
    model, _ = places(rng)
    model.attribute.trainable = False
    model.sealed.trainable = False
    count = len(model.trainable_variables)
    convert(model, in_place=True)
    assert not model.attribute.trainable
    assert not model.attribute.gamma.trainable
    assert len(helpers.learned(model.trainable_variables)) == count
    model.attribute.trainable = True
    assert len(helpers.learned(model.trainable_variables)) == count + 2


def test_arguments_and_what_is_hung_on_variables(rng):
    model, _ = places(rng)
    model.attribute.gamma.constraint = None
    gamma = model.attribute.gamma
    convert(
        model,
        in_place=True,
        momentum=0.5,
        r_max=2.0,
        frozen_statistics=True,
        gamma_regularizer="l2",
        gamma_constraint="non_neg",
    )
    assert model.attribute.gamma is gamma
    assert gamma.regularizer is not None
    assert gamma.constraint is not None
    for layer in networks.normalizations(model):
        assert layer.momentum == 0.5
        assert layer.current_limits()[0] == 2.0
        assert layer.frozen_statistics
    assert len(model.losses) == PLACES
    # Again, with others; what is not said stays.
    model.attribute.step.assign(7)
    convert(model, in_place=True, d_max=3.0, frozen_statistics=False)
    assert model.attribute.current_step() == 7
    assert model.attribute.current_limits() == (2.0, 3.0)
    assert model.attribute.momentum == 0.5
    assert not model.attribute.frozen_statistics
    convert(model, BatchNormalization, in_place=True)
    assert len(model.attribute.weights) == 4
    assert not hasattr(model.attribute, "step")


@pytest.mark.slow
@pytest.mark.skipif(
    not networks.HAS_RENORM, reason="Keras has no renorm before 3.14"
)
def test_keras_layers_with_renorm(rng):
    model, x = places(rng, lambda **a: KERAS(renorm=True, **a))
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    expected = model.predict(x, verbose=0)
    convert(model, in_place=True)
    assert [v.name for v in model.attribute.non_trainable_variables][:3] == [
        "moving_mean",
        "moving_variance",
        "step",
    ]
    assert model.attribute.current_limits() == (np.inf, np.inf)
    helpers.assert_close(model.predict(x, verbose=0), expected, 1e-6)
    model.fit(x, x, verbose=0)


def test_what_is_such_a_layer_already_stays_as_it_is(rng):
    model, _ = places(rng)
    before = [id(variable) for variable in model.variables]
    revert(model, in_place=True)
    assert before == [id(variable) for variable in model.variables]
    convert(model, in_place=True)
    before = [id(variable) for variable in model.variables]
    convert(model, in_place=True)
    assert before == [id(variable) for variable in model.variables]


@pytest.mark.tensorflow
def test_the_corrected_gradient_has_its_weights(rng):
    model = networks.sequential(KERAS)
    x = networks.data_of(model, rng)
    model.compile("sgd", "mse")
    convert(model, in_place=True, gradient_momentum=0.9)
    model.fit(x, np.ones((4, 4)), verbose=0)
    assert np.any(helpers.to_numpy(model.layers[-1].gradient_mean))


@pytest.mark.slow
def test_the_whole_life_of_a_subclassed_model(rng):
    model, x = places(rng)
    convert(model, in_place=True)
    report = diagnostics.discrepancy(model, x, verbose=False)
    assert len(report.rows) == PLACES
    recalibrate(model, x, verbose=False)
    helpers.assert_close(model.attribute.moving_mean, x.mean(axis=0), 1e-5)
    freeze_statistics(model)
    before = helpers.statistics(model.attribute)
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    for old, new in zip(
        before, helpers.statistics(model.attribute), strict=True
    ):
        assert np.array_equal(old, new)


@pytest.mark.slow
@pytest.mark.parametrize("to", OURS)
def test_weights_go_into_a_model_made_the_same_way(to, rng, tmp_path):
    model, x = places(rng)
    convert(model, to, in_place=True, momentum=0.5)
    model.compile("sgd", "mse")
    model.fit(x, x, verbose=0)
    expected = model.predict(x, verbose=0)
    model.save_weights(tmp_path / "model.weights.h5")
    model.save(tmp_path / "model.keras")
    others = [places(rng)[0]]
    convert(others[0], to, in_place=True, momentum=0.5)
    with replacing(to, momentum=0.5):
        others.append(places(rng)[0])
        loaded = keras.saving.load_model(tmp_path / "model.keras")
    for other in others:
        other.load_weights(tmp_path / "model.weights.h5")
    for other in (*others, loaded):
        assert {type(each) for each in networks.normalizations(other)} == {to}
        assert np.array_equal(other.predict(x, verbose=0), expected)
        for one, two in zip(
            networks.normalizations(model),
            networks.normalizations(other),
            strict=True,
        ):
            for name, value in values(one).items():
                assert np.array_equal(values(two)[name], value), name
            assert one.get_config() == two.get_config()


def test_a_file_outside_of_the_scope(rng, tmp_path):
    """Loads where weights fit, and is an error, not nonsense, elsewhere."""
    for to in OURS:
        model, x = places(rng)
        convert(model, to, in_place=True)
        expected = model.predict(x, verbose=0)
        path = tmp_path / f"{to.__name__}.keras"
        model.save(path)
        if to is BatchNormalization:
            loaded = keras.saving.load_model(path)
            assert type(loaded.attribute) is KERAS
            helpers.assert_close(loaded.predict(x, verbose=0), expected, 1e-6)
        else:
            with pytest.raises(ValueError, match="could not be loaded"):
                keras.saving.load_model(path)
        revert(model, in_place=True)
        model.save(path)
        loaded = keras.saving.load_model(path)
        helpers.assert_close(loaded.predict(x, verbose=0), expected, 1e-6)


@pytest.mark.slow
@pytest.mark.tensorflow
def test_a_converted_model_is_exported(rng, tmp_path):
    import tensorflow as tf

    model, x = places(rng)
    convert(model, in_place=True)
    expected = model.predict(x, verbose=0)
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    helpers.assert_close(served.serve(x), expected, 1e-5)


def test_names_that_keras_gives_go_on(rng):
    """Conversion makes layers for a moment, which count for nothing."""
    model, _ = places(rng)
    first = KERAS().name
    convert(model, in_place=True)
    revert(model, in_place=True)
    second = KERAS().name
    assert int(second.rpartition("_")[2]) == 1 + int(
        first.rpartition("_")[2].replace("normalization", "0")
    )


def raises(kind, message):
    return helpers.raises(kind, message)


def untouched(model):
    return {type(each) for each in networks.normalizations(model)} == {KERAS}


def test_errors_change_nothing(rng):
    model, _ = places(rng)
    for name, value in {
        "axis": 1,
        "center": False,
        "dtype": "float16",
        "scale": False,
    }.items():
        with raises(
            TypeError,
            f"`{name}` must not be given where in_place=True: layers keep "
            f"theirs. Received: {name}={value!r}.",
        ):
            convert(model, in_place=True, **{name: value})
    for name, value in {"name": "a", "trainable": False}.items():
        for in_place in (False, True):
            with raises(
                TypeError,
                f"`{name}` must not be given: layers keep theirs. Received: "
                f"{name}={value!r}.",
            ):
                convert(model, in_place=in_place, **{name: value})
    with raises(
        TypeError,
        "`in_place` must be True or False. Received: in_place=1.",
    ):
        revert(model, in_place=1)
    with raises(
        ValueError, "`momentum` must be in [0, 1]. Received: momentum=2.0."
    ):
        convert(model, in_place=True, momentum=2.0)
    with raises(
        TypeError,
        "`to` must be keras_renorm.BatchNormalization or "
        f"keras_renorm.BatchRenormalization. Received: to={KERAS!r}.",
    ):
        convert(model, to=KERAS, in_place=True)
    with raises(
        ValueError,
        "`virtual_batch_size` must be None where synchronized=True: one "
        "narrows the examples that share statistics, the other widens them. "
        "Received: virtual_batch_size=2.",
    ):
        convert(model, in_place=True, synchronized=True, virtual_batch_size=2)
    assert untouched(model)


def test_what_is_not_built_is_named():
    model = Places(name="places")
    # The one "in_graph" is built as it is made.
    names = "bn:1, bn:2, bn:3, in_dict, in_tuple, sealed_bn"
    if hasattr(model, "recurrent"):
        names += ", rnn/cell/bn"
    with raises(
        ValueError,
        "`model` must be built to be changed in place: call it on data, make "
        "it in `keras_renorm.replacing`, or leave out layers that it never "
        "calls (layers=lambda layer: layer.built). Received: model=places, "
        f"with the layers {names} not built.",
    ):
        convert(model, in_place=True)
    assert untouched(model)
    convert(model, layers=lambda layer: layer.built, in_place=True)
    assert [
        type(layer) is BatchRenormalization
        for layer in networks.normalizations(model)
    ] == [layer.built for layer in networks.normalizations(model)]


def test_the_last_layer_may_fail(rng):
    """Those before it stay what they are."""

    class Special(KERAS):
        pass

    model = keras.Sequential(
        [keras.Input((4,)), KERAS(), Special(name="mine")], name="model"
    )
    with pytest.raises(ValueError, match="mine of class Special"):
        convert(model, in_place=True)
    assert type(model.layers[0]) is KERAS

    def fails(shape, dtype=None):
        raise OSError("full")

    model, _ = places(np.random.default_rng(0))
    networks.normalizations(model)[-1].moving_mean_initializer = fails
    with pytest.raises(OSError, match="full"):
        convert(model, in_place=True)
    assert untouched(model)


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tf_keras's own
def test_models_of_keras_2_are_copied_as_a_whole():
    import tf_keras

    model = tf_keras.Sequential([tf_keras.layers.BatchNormalization()])
    model.build((None, 3))
    with raises(
        ValueError,
        "`model` must be of Keras 3 to be changed in place, or in part; of "
        "tf_keras a whole copy can be made. Received: in_place=True, "
        "layers=None.",
    ):
        convert(model, in_place=True)
