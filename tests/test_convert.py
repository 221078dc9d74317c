"""Our layers in the place of Keras's, in whole models, and back."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    fold,
    replacing,
    revert,
)
from keras_renorm.schedules import LinearRamp, default_limits
from tests import helpers, networks

KERAS = layers.BatchNormalization
OURS = [BatchNormalization, BatchRenormalization]


def assert_same(model, other, x, tolerance=1e-6):
    for one, two in zip(
        networks.outputs_of(model, x),
        networks.outputs_of(other, x),
        strict=True,
    ):
        if tolerance:
            helpers.assert_close(two, one, tolerance)
        else:
            assert np.array_equal(one, two)


@pytest.mark.parametrize("to", OURS)
@pytest.mark.parametrize("network", networks.ALL)
def test_inference_is_the_same_and_reverted_to_the_bit(network, to, rng):
    model = networks.randomize(network(KERAS), rng)
    x = networks.data_of(model, rng)
    before = [helpers.to_numpy(weight) for weight in model.weights]
    converted = convert(model, to=to)
    olds, news = map(networks.normalizations, (model, converted))
    assert {type(layer) for layer in news} == {to}
    # Names, order and sharing; axis, epsilon, center, momentum...
    assert [old.name for old in olds] == [new.name for new in news]
    for old, new in zip(olds, news, strict=True):
        expected = old.get_config()
        for name, value in new.get_config().items():
            if name in expected:
                assert value == expected[name], name
    assert_same(model, converted, x)
    reverted = revert(converted)
    assert {type(layer) for layer in networks.normalizations(reverted)} == {
        KERAS
    }
    assert_same(model, reverted, x, tolerance=0)
    for one, other in zip(model.weights, reverted.weights, strict=True):
        assert one.shape == other.shape
        assert np.array_equal(helpers.to_numpy(one), helpers.to_numpy(other))
    # The model is as it was.
    assert all(type(layer) is KERAS for layer in networks.normalizations(model))
    for old, weight in zip(before, model.weights, strict=True):
        assert np.array_equal(old, helpers.to_numpy(weight))


@pytest.mark.parametrize("network", networks.ALL)
def test_what_trains_is_the_same(network, rng):
    model = network(KERAS)
    converted = convert(model)
    assert len(model.trainable_weights) == len(
        helpers.learned(converted.trainable_weights)
    )
    flags = [
        [
            # An input trains nothing.
            (
                layer.name,
                layer.trainable or isinstance(layer, layers.InputLayer),
            )
            for layer in each._flatten_layers()
        ]
        for each in (model, converted)
    ]
    assert flags[0] == flags[1]
    assert converted.name == model.name


def test_a_converted_network_trains(rng):
    model = networks.randomize(networks.nested(KERAS), rng)
    converted = convert(model, momentum=0.5, r_max=2.0, d_max=1.0)
    converted.compile("sgd", "mse")
    x = networks.data_of(model, rng, 8)
    converted.fit(x, np.zeros((8, 3)), batch_size=4, verbose=0)
    # The inner model is called twice a step.
    assert [
        layer.current_step() for layer in networks.normalizations(converted)
    ] in (
        [2, 4],
        [4, 2],
    )


def test_arguments_take_the_place_of_the_layers_own():
    model = networks.sequential(KERAS)
    ramp = LinearRamp(1.0, 4.0, 10, 20)
    for layer in networks.normalizations(
        convert(model, momentum=0.5, r_max=ramp, frozen_statistics=True)
    ):
        assert layer.momentum == 0.5
        assert layer.r_max == ramp
        assert layer.frozen_statistics
    first, last = networks.normalizations(convert(model))
    assert (first.momentum, last.momentum) == (0.99, 0.8)
    assert (first.center, last.center) == (True, False)


def test_between_our_layers_everything_is_kept(rng):
    model = networks.randomize(
        networks.sequential(
            lambda **arguments: BatchRenormalization(
                r_max=2.0, virtual_batch_size=3, **arguments
            )
        ),
        rng,
    )
    x = networks.data_of(model, rng)
    model(x, training=True)
    same = networks.normalizations(convert(model))
    assert [layer.current_step() for layer in same] == [1, 1]
    assert all(layer.r_max == 2.0 for layer in same)
    assert all(layer.virtual_batch_size == 3 for layer in same)
    plain = convert(model, to=BatchNormalization)
    assert all(
        layer.virtual_batch_size == 3
        for layer in networks.normalizations(plain)
    )
    assert_same(model, plain, x)


def test_checkpoints_of_one_network_become_those_of_the_other(rng, tmp_path):
    model = networks.randomize(networks.sequential(KERAS), rng)
    model.save_weights(tmp_path / "bn.weights.h5")
    x = networks.data_of(model, rng)
    fresh = networks.sequential(KERAS)
    fresh.load_weights(tmp_path / "bn.weights.h5")
    convert(fresh).save_weights(tmp_path / "renorm.weights.h5")
    renormalized = networks.sequential(BatchRenormalization)
    renormalized.load_weights(tmp_path / "renorm.weights.h5")
    assert_same(model, renormalized, x)
    revert(renormalized).save_weights(tmp_path / "back.weights.h5")
    fresh = networks.sequential(KERAS)
    fresh.load_weights(tmp_path / "back.weights.h5")
    assert_same(model, fresh, x, tolerance=0)


@pytest.mark.skipif(
    not networks.HAS_RENORM, reason="Keras has no renorm before 3.14"
)
def test_keras_layers_with_renorm(rng):
    model = networks.sequential(
        lambda **arguments: KERAS(
            renorm=True,
            renorm_clipping={"rmax": 2.0, "rmin": 0.5, "dmax": 3.0},
            **arguments,
        )
    )
    x = networks.data_of(model, rng)
    model(x, training=True)
    networks.randomize(model, rng)
    converted = convert(model)
    for layer in networks.normalizations(converted):
        assert layer.current_limits() == (2.0, 3.0)
    assert_same(model, converted, x)
    reverted = revert(converted)
    assert not networks.normalizations(reverted)[0].renorm
    assert_same(model, reverted, x)
    unclipped = networks.sequential(lambda **a: KERAS(renorm=True, **a))
    layer = networks.normalizations(convert(unclipped))[0]
    assert layer.current_limits() == (np.inf, np.inf)
    # The smallest r of ours is the inverse of the largest: which of two?
    one_sided = networks.sequential(
        lambda **a: KERAS(
            renorm=True, renorm_clipping={"rmax": 3.0, "rmin": 0.5}, **a
        )
    )
    with pytest.warns(UserWarning, match="`rmin` of 1 / rmax"):
        layer = networks.normalizations(convert(one_sided))[0]
    assert layer.current_limits() == (2.0, np.inf)
    # Neither, without a warning.
    layer = networks.normalizations(convert(one_sided, r_max=4.0))[0]
    assert layer.current_limits() == (4.0, np.inf)
    with replacing(r_max="auto", d_max="auto"):
        assert KERAS(
            renorm=True, renorm_clipping={"rmax": 3.0, "rmin": 0.5}
        ).is_gated


@pytest.mark.slow
def test_a_reverted_model_loads_without_keras_renorm(rng, tmp_path):
    model = networks.randomize(networks.wrapped(BatchRenormalization), rng)
    x = networks.data_of(model, rng)
    revert(model).save(tmp_path / "model.keras")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, keras, numpy as np\n"
        "model = keras.saving.load_model(sys.argv[1] + '/model.keras')\n"
        "x = np.load(sys.argv[1] + '/x.npy')\n"
        "np.save(sys.argv[1] + '/y.npy', model.predict(x, verbose=0))\n"
        "assert 'keras_renorm' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        check=True,
        env={**os.environ},
    )
    helpers.assert_close(
        np.load(tmp_path / "y.npy"), model.predict(x, verbose=0), 1e-6
    )


def test_mixed_precision():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            KERAS(dtype="mixed_float16"),
            layers.Dense(2, dtype="mixed_float16"),
        ]
    )
    layer = convert(model).layers[0]
    assert layer.compute_dtype == "float16"
    assert layer.moving_mean.dtype == "float32"


def test_a_compiled_model_becomes_one_with_a_new_optimizer(rng):
    model = networks.partly_frozen(KERAS)
    model.compile(keras.optimizers.Adam(0.25), "mae")
    x = networks.data_of(model, rng)
    model.fit(x, np.zeros((4, 3)), verbose=0)
    converted = convert(model)
    assert converted.loss == "mae"
    assert float(converted.optimizer.learning_rate) == 0.25
    assert int(converted.optimizer.iterations) == 0
    converted.fit(x, np.zeros((4, 3)), verbose=0)
    assert not convert(networks.nested(KERAS)).compiled


def test_losses_in_a_nested_structure(rng):
    inputs = keras.Input((3,))
    x = KERAS()(inputs)
    model = keras.Model(
        inputs, {"boxes": [layers.Dense(2)(x), layers.Dense(1)(x)]}
    )
    model.compile("sgd", {"boxes": ["mse", "mae"]})
    x = rng.normal(size=(8, 3)).astype("float32")
    y = {"boxes": [np.zeros((8, 2)), np.zeros((8, 1))]}
    expected = model.evaluate(x, y, verbose=0)
    got = convert(model).evaluate(x, y, verbose=0)
    helpers.assert_close(np.array(got), np.array(expected), 1e-5)


def test_a_model_that_does_not_train_has_a_copy_that_does_not():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, KERAS()(inputs))
    model.trainable = False
    for function in (convert, revert):
        assert not function(model).trainable


WORDS = np.array([["a"], ["b"], ["a"], ["c"]])
NUMBERS = np.array([[5], [7], [5], [9]])


def preprocessing(name, rng):
    """An adapted layer, data, and what follows it."""
    floats = rng.normal(50.0, 9.0, (4, 1)).astype("float32")
    layer, data = {
        "Normalization": (layers.Normalization(), floats),
        "inverse": (layers.Normalization(invert=True), floats),
        "Discretization": (layers.Discretization(num_bins=3), floats),
        "StringLookup": (layers.StringLookup(), WORDS),
        "tf-idf": (layers.StringLookup(output_mode="tf_idf"), WORDS),
        "IntegerLookup": (layers.IntegerLookup(), NUMBERS),
        "TextVectorization": (
            layers.TextVectorization(output_sequence_length=1),
            WORDS,
        ),
        "Hashing": (layers.Hashing(5, salt=3), WORDS),
    }[name]
    if name == "tf-idf" and not networks.HAS_RENORM:
        pytest.skip("Keras cannot load what it saved of it before 3.14")
    if hasattr(layer, "adapt"):
        layer.adapt(data)
    return layer, data


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:.*are not folded")
@pytest.mark.parametrize(
    "name",
    [
        "Normalization",
        "inverse",
        "Discretization",
        "StringLookup",
        "tf-idf",
        "IntegerLookup",
        "TextVectorization",
        "Hashing",
    ],
)
@pytest.mark.parametrize(
    "function",
    [
        convert,
        pytest.param(revert, marks=pytest.mark.slow),
        pytest.param(fold, marks=pytest.mark.slow),
    ],
)
def test_what_a_layer_knows_besides_its_weights_is_copied(function, name, rng):
    import tensorflow as tf

    layer, data = preprocessing(name, rng)
    is_index = name not in ("Normalization", "inverse", "tf-idf")
    kind = "string" if data is WORDS else data.dtype.name
    model = keras.Sequential(
        [
            keras.Input((1,), dtype=kind),
            layer,
            *([layers.Embedding(9, 2), layers.Flatten()] if is_index else []),
            layers.Dense(3),
            KERAS(),
        ]
    )
    networks.randomize(model, rng)
    x = tf.constant(data)
    expected = helpers.to_numpy(model(x))
    assert expected.std(axis=0).min() > 0
    helpers.assert_close(helpers.to_numpy(function(model)(x)), expected, 1e-5)


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore:.*are not folded")
@pytest.mark.parametrize("function", [convert, revert, fold])
def test_an_adapted_feature_space_is_copied(function, rng):
    import tensorflow as tf

    features = {
        "size": rng.normal(50.0, 9.0, 8).astype("float32"),
        "colour": np.array(["red", "blue", "red", "green"] * 2),
    }
    space = keras.utils.FeatureSpace(
        features={
            "size": keras.utils.FeatureSpace.float_normalized(),
            "colour": keras.utils.FeatureSpace.string_categorical(),
        },
        output_mode="concat",
    )
    space.adapt(tf.data.Dataset.from_tensor_slices(features).batch(4))
    inputs = dict(space.get_inputs())
    outputs = layers.Dense(3)(space.get_encoded_features())
    model = keras.Model(inputs, KERAS()(outputs))
    # As `fit` gives them: a column each.
    x = {key: tf.constant(features[key][:, None]) for key in sorted(features)}
    expected = helpers.to_numpy(model(x))
    assert expected.std(axis=0).min() > 0
    helpers.assert_close(function(model)(x), expected, 1e-5)


def test_the_state_of_recurrent_layers_and_generators_is_copied(rng):
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(2, 3, 4)),
            layers.Bidirectional(
                layers.LSTM(3, stateful=True, return_sequences=True)
            ),
            layers.GRU(2, stateful=True),
            KERAS(),
            layers.Dropout(0.5),
        ]
    )
    x = rng.normal(size=(2, 3, 4)).astype("float32")
    model.predict(x, verbose=0)
    copy = revert(model)
    for one, other in zip(model.variables, copy.variables, strict=True):
        assert np.array_equal(helpers.to_numpy(one), helpers.to_numpy(other))
    assert_same(model, copy, x)


def squared(y, outputs):
    return keras.ops.mean((y - outputs) ** 2, axis=-1)


def relu(x):  # not Keras's
    return 3.0 * x


class Penalty(keras.regularizers.Regularizer):
    def __call__(self, weight):
        return 0.1 * keras.ops.sum(weight**2)

    def get_config(self):
        return {}


penalty = Penalty()


def halves(shape, dtype=None):
    return keras.ops.full(shape, 0.5, dtype=dtype)


@pytest.mark.filterwarnings("ignore:.*are not folded")
@pytest.mark.parametrize(
    "function",
    [
        convert,
        pytest.param(revert, marks=pytest.mark.slow),
        pytest.param(fold, marks=pytest.mark.slow),
    ],
)
def test_functions_that_no_file_could_name_are_the_copys_too(function, rng):
    class Share(keras.metrics.Mean):
        def update_state(self, y, outputs, sample_weight=None):
            super().update_state(outputs > y)

    class Halving(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.5 ** (1.0 + keras.ops.cast(step, "float32"))

        def get_config(self):
            return {}

    factor = 2.5
    frame = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(3, activation=lambda x: x * factor),
            KERAS(gamma_regularizer=penalty, gamma_initializer=halves),
        ]
    )
    model = keras.Sequential(
        [
            keras.Input((5, 3)),
            layers.Dense(3, kernel_initializer=halves),
            layers.TimeDistributed(frame),
            layers.Lambda(lambda x: x + factor),
            layers.TimeDistributed(layers.Dense(3, activation=relu)),
            layers.LSTM(3, activation=relu, kernel_regularizer=penalty),
            layers.Dense(3, activation=relu),
            KERAS(beta_regularizer=penalty),
        ]
    )
    networks.randomize(model, rng)
    model.compile(
        keras.optimizers.SGD(Halving()),
        squared,
        metrics=[squared, Share(), lambda y, outputs: outputs[:, 0]],
    )
    x = rng.normal(size=(4, 5, 3)).astype("float32")
    y = rng.normal(size=(4, 3)).astype("float32")
    copy = function(model)
    assert_same(model, copy, x, tolerance=1e-5)
    expected = model.evaluate(x, y, verbose=0)
    got = copy.evaluate(x, y, verbose=0)
    if function is not fold:  # whose penalties are those of other weights
        helpers.assert_close(np.array(got), np.array(expected), 1e-5)
    helpers.assert_close(np.array(got[1:]), np.array(expected[1:]), 1e-5)
    copy.fit(x, y, verbose=0)
    assert int(copy.optimizer.iterations) == 1
    assert int(model.optimizer.iterations) == 0


NAMES = {
    "ResNet50": 64,
    "ResNet50V2": 64,
    "MobileNetV2": 64,
    "MobileNetV3Small": 64,
    "EfficientNetB0": 64,
    "EfficientNetV2B0": 64,
    "DenseNet121": 64,
    "InceptionV3": 96,
    "Xception": 96,
}


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.parametrize("name", NAMES)
def test_keras_applications(name, rng):
    size = NAMES[name]
    model = getattr(keras.applications, name)(
        weights=None, include_top=False, input_shape=(size, size, 3)
    )
    networks.randomize_mildly(model, rng)
    x = rng.uniform(0, 255, (2, size, size, 3)).astype("float32")
    assert_there_and_back(model, x)


# The smallest images that a network takes, where they are not 32 by 32.
SIZES = {
    "InceptionResNetV2": 75,
    "InceptionV3": 75,
    "Xception": 71,
}
# So deep that with random weights a change of the input by one rounding moves
# outputs by a quarter of the largest. With smaller branches it does not.
DEEPEST = ("EfficientNetV2L",)
# Networks with layer normalization, or none.
WITHOUT = ("ConvNeXt", "VGG")


@pytest.mark.tensorflow
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name", [name for name in dir(keras.applications) if name[0].isupper()]
)
def test_all_of_keras_applications(name, rng):
    """As a copy, and in place."""
    size = SIZES.get(name, 32)
    model = getattr(keras.applications, name)(
        weights=None, include_top=False, input_shape=(size, size, 3)
    )
    if name.startswith(WITHOUT):
        assert not networks.normalizations(model)
        return
    networks.randomize_mildly(model, rng)
    if name in DEEPEST:
        for layer in networks.normalizations(model):
            layer.gamma.assign(0.3 * layer.gamma)
    x = rng.uniform(0, 255, (2, size, size, 3)).astype("float32")
    assert_there_and_back(model, x)
    expected = model.predict(x, verbose=0)
    convert(model, in_place=True)
    helpers.assert_close(model.predict(x, verbose=0), expected, 2e-6)
    revert(model, in_place=True)
    assert np.array_equal(model.predict(x, verbose=0), expected)


def hub_backbone(name):
    """A small network of keras-hub of each kind."""
    models = pytest.importorskip("keras_hub").models
    shape = {"image_shape": (64, 64, 3)}
    if name.startswith("resnet"):
        return models.ResNetBackbone(
            input_conv_filters=[64],
            input_conv_kernel_sizes=[7],
            stackwise_num_filters=[64, 32],
            stackwise_num_blocks=[2, 2],
            stackwise_num_strides=[1, 2],
            block_type="basic_block",
            use_pre_activation=name == "resnet v2",
            **shape,
        )
    return models.EfficientNetBackbone(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        stackwise_kernel_sizes=[3, 3],
        stackwise_num_repeats=[1, 2],
        stackwise_input_filters=[8, 16],
        stackwise_output_filters=[16, 24],
        stackwise_expansion_ratios=[1, 4],
        stackwise_strides=[1, 2],
        stackwise_squeeze_and_excite_ratios=[0.25, 0.25],
        stackwise_block_types=["v1", "v1"],
        **shape,
    )


@pytest.mark.slow
@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # keras-hub's own
@pytest.mark.parametrize("name", ["resnet", "resnet v2", "efficientnet"])
def test_backbones_of_keras_hub(name, rng):
    model = networks.randomize_mildly(hub_backbone(name), rng)
    x = rng.uniform(0, 1, (2, 64, 64, 3)).astype("float32")
    assert_there_and_back(model, x)


def assert_there_and_back(model, x):
    converted = convert(model)
    assert len(networks.normalizations(converted)) == len(
        networks.normalizations(model)
    )
    assert [layer.name for layer in converted.layers] == [
        layer.name for layer in model.layers
    ]
    expected = model.predict(x, verbose=0)
    assert np.all(np.isfinite(expected))
    assert expected.std() > 0
    helpers.assert_close(converted.predict(x, verbose=0), expected, 2e-6)
    reverted = revert(converted)
    assert np.array_equal(reverted.predict(x, verbose=0), expected)


def raises(kind, match):
    return pytest.raises(kind, match=match)


def test_errors():
    model = networks.sequential(KERAS)
    with raises(TypeError, "`to` must be keras_renorm.BatchNormalization or"):
        convert(model, to=KERAS)
    with raises(ValueError, r"`momentum` must be in \[0, 1\]. Received: mom"):
        convert(model, momentum=2.0)
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(2)], name="mlp")
    for function in (convert, revert):
        with raises(
            ValueError,
            "^`model` must have a batch normalization layer. Received: "
            "model=mlp, which has none.$",
        ):
            function(plain)


@pytest.mark.parametrize(
    ("given", "to", "hint"),
    [
        (
            {"inplace": True},
            BatchRenormalization,
            " Did you mean `in_place`?",
        ),
        ({"layer": "bn"}, BatchRenormalization, " Did you mean `layers`?"),
        ({"rmax": 3}, BatchRenormalization, " Did you mean `r_max`?"),
        ({"eps": 1e-5}, BatchNormalization, " Did you mean `epsilon`?"),
        (
            {"r_max": 2.0},
            BatchNormalization,
            " `keras_renorm.BatchRenormalization` has it.",
        ),
        ({"decay": 0.9}, BatchNormalization, " Did you mean `momentum`?"),
        ({"zebra": 0.9}, BatchNormalization, ""),
    ],
)
def test_arguments_that_nobody_takes(given, to, hint):
    model = networks.sequential(KERAS)
    ((name, value),) = given.items()
    message = (
        f"`{name}` must be an argument of `convert` or of {to.__name__}. "
        f"Received: {name}={value!r}.{hint}"
    )
    for in_place in (False, True):
        with helpers.raises(TypeError, message):
            convert(model, to, in_place=in_place, **given)


def test_what_is_out_of_reach_is_named():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__(name="subclassed")
            self.bn = KERAS(name="own_bn")

        def call(self, x, training=None):
            return self.bn(x, training=training)

    with raises(
        ValueError,
        r"^`model` must be a sequential or a functional model: of another no "
        r"copy with other layers can be made \(`keras_renorm.convert` changes "
        r"any with in_place=True\). Received: model=subclassed, of class "
        r"Subclassed, with the layers own_bn.$",
    ):
        convert(Subclassed())

    class Bare(keras.Model):
        pass

    with raises(ValueError, "model=bare, of class Bare.$"):
        fold(Bare(name="bare"))

    class Special(KERAS):
        pass

    special = keras.Sequential([keras.Input((4,)), Special(name="mine")])
    with raises(ValueError, "Received: mine of class Special.$"):
        convert(special)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "kind", [keras.layers.BatchNormalization, BatchNormalization]
)
@pytest.mark.parametrize("is_gated", [False, True])
def test_limits_are_open_where_statistics_are_trained(
    is_gated, kind, in_place, rng
):
    model = keras.Sequential([keras.Input((3,)), kind(), kind(name="new")])
    model.layers[0].moving_mean.assign([1.0, 2.0, 3.0])
    arguments = {} if is_gated else {"gradient_momentum": None}
    converted = convert(model, in_place=in_place, **arguments)
    trained, new = converted.layers
    # A gate begins as in a new layer: the data may be of another domain.
    limits = default_limits(0.99) if is_gated else (3.0, 5.0)
    assert (trained.r_max, trained.d_max) == limits
    assert (new.r_max, new.d_max) == default_limits(0.99)
    assert trained.is_gated == new.is_gated == is_gated


def test_limits_that_are_given_stay():
    model = keras.Sequential([keras.Input((3,)), BatchNormalization()])
    model.layers[0].moving_mean.assign([1.0, 2.0, 3.0])
    (layer,) = convert(model, d_max=2.0).layers
    assert (layer.r_max, layer.d_max) == (3.0, 2.0)
    (layer,) = convert(model, d_max=LinearRamp(0.0, 2.0, 3, 7)).layers
    assert layer.d_max == LinearRamp(0.0, 2.0, 3, 7)
    again = convert(convert(model, r_max=1.5, d_max=0.5), momentum=0.9)
    assert (again.layers[0].r_max, again.layers[0].d_max) == (1.5, 0.5)


@pytest.mark.parametrize("to", [BatchNormalization, BatchRenormalization])
@pytest.mark.parametrize("held_by", ["layer", "model", "wrapper"])
def test_what_was_frozen_trains_once_it_is_not(held_by, to):
    norm = KERAS()
    holder = (
        keras.layers.TimeDistributed(norm) if held_by == "wrapper" else norm
    )
    model = keras.Sequential([keras.Input((3, 4)), holder])
    (model if held_by == "model" else holder).trainable = False
    expected = [weight.name for weight in model.weights[:2]]
    for each in (model, convert(model, to)):
        assert not each.trainable_weights
        each.trainable = True
        for layer in each.layers:
            layer.trainable = True
        names = [weight.name for weight in each.trainable_weights]
        assert names[:2] == expected
