"""Bad input: the argument, the rule, the value; nothing has changed."""

import re

import keras
import numpy as np
import pytest

import keras_renorm
from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm.callbacks import RenormScheduler
from keras_renorm.schedules import LinearRamp, ioffe2017
from tests import helpers

LAYERS = [BatchNormalization, BatchRenormalization]


def raises(kind, message):
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"momentum": 1.5},
            ValueError,
            "`momentum` must be in [0, 1]. Received: momentum=1.5.",
        ),
        (
            {"momentum": -0.1},
            ValueError,
            "`momentum` must be in [0, 1]. Received: momentum=-0.1.",
        ),
        (
            {"momentum": np.nan},
            ValueError,
            "`momentum` must not be NaN. Received: momentum=nan.",
        ),
        (
            {"momentum": "0.9"},
            TypeError,
            "`momentum` must be a number. Received: momentum='0.9'.",
        ),
        (
            {"momentum": True},
            TypeError,
            "`momentum` must be a number. Received: momentum=True.",
        ),
        (
            {"epsilon": 0.0},
            ValueError,
            "`epsilon` must be positive and finite. Received: epsilon=0.0.",
        ),
        (
            {"epsilon": -1e-3},
            ValueError,
            "`epsilon` must be positive and finite. Received: epsilon=-0.001.",
        ),
        (
            {"epsilon": np.inf},
            ValueError,
            "`epsilon` must be positive and finite. Received: epsilon=inf.",
        ),
        (
            {"epsilon": np.nan},
            ValueError,
            "`epsilon` must not be NaN. Received: epsilon=nan.",
        ),
        (
            {"epsilon": None},
            TypeError,
            "`epsilon` must be a number. Received: epsilon=None.",
        ),
        (
            {"axis": 1.0},
            TypeError,
            "`axis` must be an integer. Received: axis=1.0.",
        ),
        (
            {"axis": [3]},
            TypeError,
            "`axis` must be an integer. Received: axis=[3].",
        ),
        (
            {"frozen_statistics": 1},
            TypeError,
            "`frozen_statistics` must be True or False. "
            "Received: frozen_statistics=1.",
        ),
        (
            {"center": "yes"},
            TypeError,
            "`center` must be True or False. Received: center='yes'.",
        ),
        (
            {"scale": None},
            TypeError,
            "`scale` must be True or False. Received: scale=None.",
        ),
        (
            {"trainable": 1},
            TypeError,
            "`trainable` must be True or False. Received: trainable=1.",
        ),
        (
            {"synchronized": 1},
            TypeError,
            "`synchronized` must be True or False. Received: synchronized=1.",
        ),
        (
            {"virtual_batch_size": 0},
            ValueError,
            "`virtual_batch_size` must be at least 1. Received: "
            "virtual_batch_size=0.",
        ),
        (
            {"virtual_batch_size": 2.0},
            TypeError,
            "`virtual_batch_size` must be an integer. Received: "
            "virtual_batch_size=2.0.",
        ),
        (
            {"virtual_batch_size": 4, "synchronized": True},
            ValueError,
            "`virtual_batch_size` must be None where synchronized=True: one "
            "narrows the examples that share statistics, the other widens "
            "them. Received: virtual_batch_size=4.",
        ),
        (
            {"renorm": True},
            TypeError,
            "`renorm` must not be given: batch renormalization is the layer "
            "`keras_renorm.BatchRenormalization`, whose limits are `r_max` "
            "and `d_max`. Received: renorm=True.",
        ),
        (
            {"renorm_clipping": {"rmax": 3}},
            TypeError,
            "`renorm_clipping` must not be given: batch renormalization is "
            "the layer `keras_renorm.BatchRenormalization`, whose limits are "
            "`r_max` and `d_max`. Received: renorm_clipping={'rmax': 3}.",
        ),
        (
            {"renorm_momentum": 0.9},
            TypeError,
            "`renorm_momentum` must not be given: batch renormalization is "
            "the layer `keras_renorm.BatchRenormalization`, whose limits are "
            "`r_max` and `d_max`. Received: renorm_momentum=0.9.",
        ),
    ],
)
def test_arguments_of_both_layers(layer, arguments, kind, message):
    with raises(kind, message):
        layer(**arguments)


LIMITS = [
    (
        "r_max",
        0.5,
        ValueError,
        "`r_max` must be at least 1. Received: r_max=0.5.",
    ),
    (
        "r_max",
        np.nan,
        ValueError,
        "`r_max` must be at least 1. Received: r_max=nan.",
    ),
    (
        "r_max",
        "3",
        TypeError,
        '`r_max` must be a number, a `LinearRamp`, or "auto" for a new '
        "layer. Received: r_max='3'.",
    ),
    (
        "r_max",
        None,
        TypeError,
        '`r_max` must be a number, a `LinearRamp`, or "auto" for a new '
        "layer. Received: r_max=None.",
    ),
    (
        "r_max",
        LinearRamp(3.0, 0.9, 0, 5),
        ValueError,
        "`r_max` must be at least 1. Received: r_max=LinearRamp("
        "initial_value=3.0, final_value=0.9, begin_step=0, end_step=5).",
    ),
    (
        "d_max",
        -1,
        ValueError,
        "`d_max` must be at least 0. Received: d_max=-1.0.",
    ),
    (
        "d_max",
        True,
        TypeError,
        '`d_max` must be a number, a `LinearRamp`, or "auto" for a new layer. '
        "Received: d_max=True.",
    ),
    (
        "d_max",
        LinearRamp(-0.1, 1.0, 0, 5),
        ValueError,
        "`d_max` must be at least 0. Received: d_max=LinearRamp("
        "initial_value=-0.1, final_value=1.0, begin_step=0, end_step=5).",
    ),
]


@pytest.mark.parametrize(("name", "value", "kind", "message"), LIMITS)
def test_limits(name, value, kind, message):
    with raises(kind, message):
        BatchRenormalization(**{name: value})
    layer = BatchRenormalization()
    layer.build((None, 3))
    before = layer.get_config()
    with raises(kind, message):
        setattr(layer, name, value)
    assert layer.get_config() == before
    if value is not None:
        with raises(kind, message):
            RenormScheduler(**{name: value})


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            {"total_steps": 0},
            ValueError,
            "`total_steps` must be at least 1. Received: total_steps=0.",
        ),
        (
            {"total_steps": 1e4},
            TypeError,
            "`total_steps` must be an integer. Received: total_steps=10000.0.",
        ),
        (
            {"total_steps": 100, "r_max": 2.0, "d_max": 1.0},
            ValueError,
            "`total_steps` must be None where both limits are given: it scales "
            "the paper's ramps. Received: total_steps=100, r_max=2.0, "
            "d_max=1.0.",
        ),
    ],
)
def test_total_steps(arguments, kind, message):
    with raises(kind, message):
        RenormScheduler(**arguments)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (
            (1.0, 2.0, 10, 5),
            ValueError,
            "`end_step` must not lie before `begin_step`. Received: "
            "begin_step=10, end_step=5.",
        ),
        (
            (1.0, 2.0, -1, 5),
            ValueError,
            "`begin_step` must be at least 0. Received: begin_step=-1.",
        ),
        (
            (1.0, 2.0, 0.5, 5),
            TypeError,
            "`begin_step` must be an integer. Received: begin_step=0.5.",
        ),
        (
            (1.0, np.nan, 0, 5),
            ValueError,
            "`final_value` must not be NaN. Received: final_value=nan.",
        ),
        (
            ("1", 2.0, 0, 5),
            TypeError,
            "`initial_value` must be a number. Received: initial_value='1'.",
        ),
        (
            (1.0, np.inf, 0, 5),
            ValueError,
            "`final_value` must be finite where `begin_step` is less than "
            "`end_step`. Received: final_value=inf, begin_step=0, end_step=5.",
        ),
    ],
)
def test_ramps(arguments, kind, message):
    with raises(kind, message):
        LinearRamp(*arguments)


@pytest.mark.parametrize(
    ("total", "kind", "message"),
    [
        (
            0,
            ValueError,
            "`total_steps` must be at least 1. Received: total_steps=0.",
        ),
        (
            10.0,
            TypeError,
            "`total_steps` must be an integer. Received: total_steps=10.0.",
        ),
    ],
)
def test_lengths_of_runs(total, kind, message):
    with raises(kind, message):
        ioffe2017(total)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("axis", [3, -4])
def test_an_axis_that_the_input_lacks(kind, axis):
    with raises(
        ValueError,
        f"`axis` must be an axis of the input, which has 3. "
        f"Received: axis={axis}.",
    ):
        kind(axis)(np.ones((2, 3, 4), "float32"))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("axis", [0, -3])
def test_virtual_batches_with_channels_on_the_first_axis(kind, axis):
    layer = kind(axis, virtual_batch_size=2)
    with raises(
        ValueError,
        "`virtual_batch_size` must be None where the channels are on the "
        "first axis: its groups are of examples, which lie there. Received: "
        f"virtual_batch_size=2, axis={axis}.",
    ):
        layer.build((5, 4, 3))
    assert layer.weights == []


@pytest.mark.parametrize("kind", LAYERS)
def test_an_unknown_number_of_channels(kind):
    layer = kind(axis=1)
    with raises(
        ValueError,
        "The size of the channel axis must be known. Received: "
        "input_shape=(None, None, 3), axis=1.",
    ):
        layer.build((None, None, 3))
    assert layer.weights == []


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("axis", "mask_shape", "expected"),
    [
        (-1, (4, 6), (4, 5)),
        (-1, (4, 5, 3), (4, 5)),
        (-1, (3,), (4, 5)),
        (1, (4, 6), (4, 3)),
        (0, (3,), (5, 3)),
    ],
)
def test_a_mask_that_does_not_broadcast(
    kind, training, axis, mask_shape, expected, rng
):
    layer = kind(axis)
    inputs = helpers.inputs_of(rng, (4, 5, 3), axis)
    layer.build(inputs.shape)
    before = helpers.statistics(layer)
    with pytest.raises(
        ValueError,
        match=re.escape(
            "`mask` must broadcast against the leading non-channel axes of "
            f"`inputs`, {expected}. Received: mask.shape={mask_shape}, "
            f"inputs.shape=(4, 5, 3), axis={axis % 3}."
        ),
    ):
        layer(inputs, training=training, mask=np.ones(mask_shape, bool))
    for old, new in zip(before, helpers.statistics(layer), strict=True):
        assert np.array_equal(old, new)


@pytest.mark.parametrize(
    ("layer", "given", "hint"),
    [
        (BatchRenormalization, {"rmax": 3}, "Did you mean `r_max`?"),
        (BatchRenormalization, {"eps": 1e-5}, "Did you mean `epsilon`?"),
        (BatchNormalization, {"momentun": 0.9}, "Did you mean `momentum`?"),
        (BatchNormalization, {"decay": 0.9}, "Did you mean `momentum`?"),
        (
            BatchNormalization,
            {"virtual_batch": 2},
            "Did you mean `virtual_batch_size`?",
        ),
        (
            BatchRenormalization,
            {"affine": False},
            "Did you mean `center` and `scale`?",
        ),
        (
            BatchNormalization,
            {"num_features": 64},
            "A layer sees by itself how many channels there are.",
        ),
        (
            BatchNormalization,
            {"r_max": 3.0},
            "`keras_renorm.BatchRenormalization` has it.",
        ),
    ],
)
def test_an_argument_of_another_name(layer, given, hint):
    ((name, value),) = given.items()
    with raises(
        ValueError,
        f"`{name}` must be an argument of {layer.__name__}. Received: "
        f"{name}={value!r}. {hint}",
    ):
        layer(**given)


def test_keras_answers_for_an_argument_like_no_other():
    with pytest.raises(ValueError, match="unknown"):
        BatchNormalization(unknown=0.9)


INVALID_ATTRIBUTES = [
    (
        "momentum",
        1.5,
        ValueError,
        "`momentum` must be in [0, 1]. Received: momentum=1.5.",
    ),
    (
        "epsilon",
        0,
        ValueError,
        "`epsilon` must be positive and finite. Received: epsilon=0.",
    ),
    (
        "synchronized",
        1,
        TypeError,
        "`synchronized` must be True or False. Received: synchronized=1.",
    ),
    *(
        (
            name,
            new,
            ValueError,
            f"`{name}` must not change once a layer is built. Received: "
            f"{name}={new}, which is {old} in layer bn. "
            "`keras_renorm.convert` makes a model with other layers.",
        )
        for name, new, old in [
            ("axis", 1, -1),
            ("center", False, True),
            ("scale", False, True),
            ("synchronized", True, False),
            ("virtual_batch_size", 4, None),
        ]
    ),
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("name", "value", "kind", "message"), INVALID_ATTRIBUTES
)
def test_attributes(layer, name, value, kind, message):
    layer = layer(name="bn")
    layer.build((None, 3))
    before = layer.get_config()
    with raises(kind, message):
        setattr(layer, name, value)
    assert layer.get_config() == before
    setattr(layer, name, before[name])  # what it is already


def test_attributes_that_exclude_each_other():
    layer = BatchNormalization(virtual_batch_size=4)
    layer.synchronized = True
    with raises(
        ValueError,
        "`virtual_batch_size` must be None where synchronized=True: one "
        "narrows the examples that share statistics, the other widens "
        "them. Received: virtual_batch_size=4.",
    ):
        layer.build((None, 3))
    assert not layer.weights


def test_a_scheduler_without_a_renormalization_layer():
    model = keras.Sequential([keras.Input((2,)), BatchNormalization()])
    model.compile("sgd", "mse")
    x = np.ones((4, 2))
    with raises(
        ValueError,
        "`model` must contain a `BatchRenormalization` layer. "
        f"Received: model={model.name}.",
    ):
        model.fit(x, x, verbose=0, callbacks=[RenormScheduler()])


def test_a_scheduler_that_cannot_know_the_length_of_the_run():
    layer = BatchRenormalization()
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile("sgd", "mse")

    def batches():
        for _ in range(4):
            yield np.ones((4, 2)), np.ones((4, 2))

    before = layer.get_config()
    with raises(
        ValueError,
        "`steps_per_epoch` must be given where the length of the data is "
        "unknown, or `total_steps`, or `r_max` and `d_max` as ramps: the "
        "paper's ramp is scaled to the number of steps. Received: steps=None.",
    ):
        model.fit(
            batches(), shuffle=False, verbose=0, callbacks=[RenormScheduler()]
        )
    assert layer.get_config() == before


def test_a_function_that_gives_a_bad_limit():
    layer = BatchRenormalization()
    model = keras.Sequential([keras.Input((2,)), layer])
    model.compile("sgd", "mse")
    x = np.ones((4, 2))
    number = '`r_max` must be a number, a `LinearRamp`, or "auto" for a new '
    for value, kind, message in (
        (0.2, ValueError, "`r_max` must be at least 1. Received: r_max=0.2."),
        (None, TypeError, f"{number}layer. Received: r_max=None."),
    ):
        scheduler = RenormScheduler(lambda step, value=value: value)
        with raises(kind, message):
            model.fit(x, x, verbose=0, callbacks=[scheduler])


FUNCTIONS = {
    "convert": keras_renorm.convert,
    "convert in place": lambda model: keras_renorm.convert(
        model, in_place=True
    ),
    "revert": keras_renorm.revert,
    "fold": keras_renorm.fold,
    "freeze_statistics": keras_renorm.freeze_statistics,
    "unfreeze_statistics": keras_renorm.unfreeze_statistics,
    "get_statistics": keras_renorm.get_statistics,
    "set_statistics": lambda model: keras_renorm.set_statistics(model, {}),
    "recalibrate": lambda model: keras_renorm.recalibrate(model, np.ones(2)),
    "discrepancy": lambda model: keras_renorm.diagnostics.discrepancy(
        model, np.ones(2)
    ),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("model", "received"),
    [
        (None, "None."),
        (
            "m.keras",
            "'m.keras'. `keras.saving.load_model` reads a file.",
        ),
        (keras.Sequential, "<class 'keras.src.models.sequential.Sequential'>."),
    ],
)
def test_what_is_not_a_model(function, model, received):
    with raises(
        TypeError,
        f"`model` must be a Keras model. Received: model={received}",
    ):
        FUNCTIONS[function](model)


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tf_keras's own
def test_a_model_of_keras_2_is_not_one():
    import tf_keras

    model = tf_keras.Sequential(name="old")
    with raises(
        TypeError,
        f"`model` must be a Keras model. Received: model={model!r}. "
        "`keras_renorm.convert` makes one of a model of tf_keras.",
    ):
        keras_renorm.get_statistics(model)


@pytest.mark.parametrize("given", [["Flat"], {"Flat": 3}, {3: len}])
def test_custom_objects_are_functions_by_name(given):
    model = keras.Sequential([keras.Input((4,)), BatchNormalization()])
    with raises(
        TypeError,
        "`custom_objects` must be a dictionary from names to classes or "
        f"functions. Received: custom_objects={given!r}.",
    ):
        keras_renorm.convert(model, custom_objects=given)


def test_custom_objects_are_for_models_of_keras_2():
    model = keras.Sequential(
        [keras.Input((4,)), BatchNormalization()], name="net"
    )
    with raises(
        ValueError,
        "`custom_objects` must be given with a model of tf_keras only. "
        "Received: model=net, of Keras 3.",
    ):
        keras_renorm.convert(model, custom_objects={})
