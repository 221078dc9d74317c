"""`tile_mismatch`: what tiles do to a prediction, and why."""

import collections
import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_renorm
from keras_renorm.diagnostics import tile_mismatch
from tests import helpers

ROWS = (1, 64, 64, 2)


def convolution(filters=4, **arguments):
    return layers.Conv2D(filters, 3, padding="same", **arguments)


def network(*between, shape=(None, None, 2)):
    inputs = keras.Input(shape)
    outputs = inputs
    for layer in between:
        outputs = layer(outputs)
    return keras.Model(inputs, outputs, name="net")


def image(rng, shape=ROWS):
    return rng.normal(size=shape).astype("float32")


class InstanceNorm(layers.Layer):
    """Normalization that Keras does not know."""

    def call(self, x):
        mean, variance = ops.moments(x, (1, 2), keepdims=True)
        return (x - mean) * ops.rsqrt(variance + 1e-3)


class Excite(layers.Layer):
    def __init__(self):
        super().__init__()
        self.pool = layers.GlobalAveragePooling2D(keepdims=True, name="pool")

    def call(self, x):
        return x * ops.sigmoid(self.pool(x))


@pytest.mark.parametrize(
    "between",
    [
        layers.BatchNormalization,
        keras_renorm.BatchNormalization,
        keras_renorm.BatchRenormalization,
        layers.LayerNormalization,  # over channels, of each pixel
        lambda: layers.Dropout(0.5),
    ],
)
def test_no_trace(between, rng):
    model = network(convolution(), between(), layers.ReLU(), convolution(2))
    report = tile_mismatch(model, image(rng), 16, 8, verbose=False)
    assert report.verdicts == []
    assert report.largest == 0
    assert report.needed == (2, 2)
    assert report.is_beyond == (False, False)
    (output,) = report.outputs
    assert output.whole.largest < 1e-5
    assert output.map.shape == (1, 64, 64)
    assert "no trace" in repr(report)
    assert "Tiles leave no trace." in str(report)


@pytest.mark.parametrize(
    ("between", "cause", "name"),
    [
        (
            lambda: layers.GroupNormalization(2, name="group"),
            "normalization by tile",
            "group",
        ),
        (
            lambda: layers.GroupNormalization(-1, name="instance"),
            "normalization by tile",
            "instance",
        ),
        (
            lambda: InstanceNorm(name="own_norm"),
            "normalization by tile",
            "own_norm",
        ),
        (Excite, "a layer sees the whole tile", "pool"),
    ],
)
def test_what_sees_a_whole_tile_is_named(between, cause, name, rng):
    model = network(convolution(), between(), convolution(2))
    given = image(rng)
    report = tile_mismatch(model, given, 16, 8, verbose=False)
    (verdict,) = report.verdicts
    assert (verdict.cause, verdict.layers) == (cause, (name,))
    assert f"{report.largest:.2g}" in verdict.reason
    # What is held does not hide how far the others see.
    assert report.needed == (2, 2)
    assert report.largest > 1e-3
    assert report.outputs[0].whole.largest > 1e-3
    assert cause in repr(report)
    assert name in str(report)


def test_layer_normalization_of_a_fixed_size(rng):
    model = network(
        convolution(),
        layers.LayerNormalization(axis=(1, 2, 3), name="all"),
        shape=(32, 32, 2),
    )
    report = tile_mismatch(model, image(rng), 16, 8, verbose=False)
    assert [each.layers for each in report.verdicts] == [("all",)]
    # The model does not take the whole image.
    assert report.outputs[0].whole is None
    assert "tiles and the whole image" not in str(report)


@pytest.mark.parametrize(("halo", "is_enough"), [(0, 0), (5, 0), (6, 1)])
def test_the_halo_that_is_needed(halo, is_enough, rng):
    model = network(
        convolution(dilation_rate=4),
        layers.BatchNormalization(),
        convolution(),
        convolution(1),
    )
    given = image(rng)
    if is_enough:
        report = tile_mismatch(model, given, 16, halo, verbose=False)
        assert report.largest == 0
    else:
        with pytest.warns(UserWarning, match="The network sees 6 x 6 pixels"):
            report = tile_mismatch(model, given, 16, halo, verbose=False)
        assert report.verdicts[0].cause == "the halo is too small"
        assert report.largest > 1e-3
    assert report.needed == (6, 6)


def test_what_it_sees_may_be_more_than_a_window(rng):
    model = network(*(convolution() for _ in range(12)))
    with pytest.warns(UserWarning, match="at least"):
        report = tile_mismatch(model, image(rng), 8, 4, verbose=False)
    assert report.is_beyond == (True, True)
    assert "at least" in str(report)


def test_the_map_is_of_two_tilings(rng):
    """Against predictions that are put together by hand."""
    model = network(convolution(), layers.GroupNormalization(2), convolution(3))
    given = image(rng, (2, 32, 32, 2))
    report = tile_mismatch(model, given, 8, 4, batch_size=3, verbose=False)

    def tiled(first):
        edges = [0, *range(first, 32, 8), 32]
        pairs = list(itertools.pairwise(edges))
        result = np.zeros((2, 32, 32, 3), "float32")
        for top, bottom in pairs:
            for left, right in pairs:
                row, column = (
                    min(max(each - 4, 0), 16) for each in (top, left)
                )
                part = given[:, row : row + 16, column : column + 16]
                found = helpers.to_numpy(model(part))
                result[:, top:bottom, left:right] = found[
                    :, top - row : bottom - row, left - column : right - column
                ]
        return result

    difference = np.abs(tiled(8) - tiled(4))
    (output,) = report.outputs
    np.testing.assert_allclose(output.map, difference.max(-1), atol=1e-5)
    np.testing.assert_allclose(output.tilings.mean, difference.mean(), 1e-3)
    np.testing.assert_allclose(output.tilings.largest, difference.max(), 1e-3)
    np.testing.assert_allclose(
        output.tilings.high, np.quantile(difference, 0.95), 1e-3
    )
    whole = np.abs(tiled(8) - helpers.to_numpy(model(given)))
    np.testing.assert_allclose(output.whole.largest, whole.max(), 1e-3)
    (row,) = report.rows
    assert row["largest"] == output.tilings.largest
    assert row["whole_mean"] == output.whole.mean


def test_several_outputs_on_grids_of_their_own(rng):
    inputs = keras.Input((None, None, 2))
    coarse = convolution(strides=2, name="coarse")(inputs)
    fine = layers.UpSampling2D(name="fine")(convolution()(coarse))
    label = layers.GlobalAveragePooling2D(name="label")(coarse)
    model = keras.Model(
        inputs, {"fine": fine, "coarse": coarse, "label": label}
    )
    report = tile_mismatch(model, image(rng), 16, 8, verbose=False)
    assert {each.name: each.map.shape for each in report.outputs} == {
        "coarse": (1, 32, 32),
        "fine": (1, 64, 64),
    }
    assert report.largest == 0
    assert report.verdicts == []


def test_volumes(rng):
    volume = image(rng, (1, 16, 32, 16, 1))

    def of(normalization):
        model = network(
            layers.Conv3D(2, 3, padding="same"),
            normalization,
            shape=(None, None, None, 1),
        )
        return tile_mismatch(model, volume, (4, 8, 4), (2, 2, 4), verbose=False)

    assert of(layers.BatchNormalization()).largest < 1e-6
    report = of(layers.GroupNormalization(2))
    assert report.verdicts[0].cause == "normalization by tile"
    assert report.needed == (1, 1, 1)


@pytest.mark.parametrize("backend", [pytest.param(1, marks=pytest.mark.jax)])
def test_channels_first(backend, rng):
    inputs = keras.Input((2, None, None))
    outputs = convolution(data_format="channels_first")(inputs)
    outputs = layers.GroupNormalization(2, axis=1, name="group")(outputs)
    model = keras.Model(inputs, outputs)
    given = image(rng).transpose(0, 3, 1, 2)
    report = tile_mismatch(model, given, 16, 8, verbose=False)
    assert report.verdicts[0].layers == ("group",)
    assert report.outputs[0].map.shape == (1, 64, 64)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_types_of_16_bits(policy, rng):
    def of(normalization):
        model = network(
            convolution(dtype=policy),
            normalization(dtype=policy),
            convolution(1, dtype=policy),
        )
        uneven = image(rng) * np.linspace(0, 4, 64)[:, None]
        return tile_mismatch(model, uneven, 16, 8, verbose=False)

    assert of(layers.BatchNormalization).verdicts == []
    assert of(lambda dtype: layers.GroupNormalization(2, dtype=dtype)).verdicts


def test_nothing_changes(rng):
    model = network(
        convolution(),
        layers.Dropout(0.5),
        keras_renorm.BatchRenormalization(),
        layers.GroupNormalization(2),
    )
    before = [helpers.to_numpy(each) for each in model.variables]
    dicts = [dict(vars(layer)) for layer in model.layers]
    tile_mismatch(model, image(rng), 16, 8, verbose=False)
    for variable, value in zip(model.variables, before, strict=True):
        assert np.array_equal(helpers.to_numpy(variable), value)
    assert [vars(layer).get("call") for layer in model.layers] == [
        each.get("call") for each in dicts
    ]


def test_a_subclassed_model(rng):
    class Model(keras.Model):
        def __init__(self):
            super().__init__(name="own")
            self.first = convolution()
            self.group = layers.GroupNormalization(2, name="group")

        def call(self, x):
            return self.group(self.first(x))

    model = Model()
    with helpers.raises(
        ValueError, "`model` must be built: call it once. Received: model=own."
    ):
        tile_mismatch(model, image(rng), 16, 8, verbose=False)
    model(image(rng))
    report = tile_mismatch(model, image(rng), 16, 8, verbose=False)
    assert report.verdicts[0].layers == ("group",)


def test_it_is_drawn(rng):
    pytest.importorskip("matplotlib")
    model = network(convolution(), layers.GroupNormalization(2))
    report = tile_mismatch(model, image(rng), 16, 8, verbose=False)
    figure = report.plot()
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(drawn, report.outputs[0].map[0])


def test_progress_is_shown(rng, capsys):
    model = network(convolution())
    tile_mismatch(model, image(rng), 16, 8, batch_size=4)
    assert "11/11" in capsys.readouterr().out


def test_a_whole_image_that_the_model_does_not_take(rng):
    class Positions(keras.Model):
        def build(self, input_shape):
            self.positions = self.add_weight(shape=(1, 32, 32, 2))

        def call(self, x):
            return x + self.positions

    model = Positions()
    model(image(rng, (1, 32, 32, 2)))
    with pytest.raises(ValueError, match=r"^`whole` must be False .*64 x 64"):
        tile_mismatch(model, image(rng), 16, 8, verbose=False)
    report = tile_mismatch(model, image(rng), 16, 8, whole=False, verbose=False)
    assert report.outputs[0].whole is None


SIZE = "A tile with its halo must lie in the image. Received: "


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        (
            {"image": np.zeros(ROWS[1:])},
            ValueError,
            "`image` must have the axes of the model's input: images, sizes "
            "and channels. Received: image.shape=(64, 64, 2) for an input of 4 "
            "axes.",
        ),
        (
            {"image": np.full(ROWS, "cat")},
            TypeError,
            "`image` must hold real numbers. Received: dtype=<U3.",
        ),
        (
            {"image": np.zeros(ROWS, "complex64")},
            TypeError,
            "`image` must hold real numbers. Received: dtype=complex64.",
        ),
        (
            {"image": "nuclei.png"},
            TypeError,
            "`image` must hold real numbers. Received: dtype=<U10.",
        ),
        (
            {"image": np.full(ROWS, np.nan)},
            ValueError,
            "`image` must be finite: one NaN is all that a tile would show. "
            "Received: 8192 values of 8192 that are not.",
        ),
        (
            {"image": np.zeros((0, *ROWS[1:]))},
            ValueError,
            "`image` must hold an image. Received: image.shape=(0, 64, 64, 2).",
        ),
        (
            {"image": np.zeros((1, 64, 64, 3))},
            ValueError,
            "`image` must have the 2 channels of the model's input. Received: "
            "image.shape=(1, 64, 64, 3).",
        ),
        (
            {"halo": 30},
            ValueError,
            f"{SIZE}tile=16, halo=30, a window of 76 of 64 pixels.",
        ),
        (
            {"tile": (16, 16, 16)},
            ValueError,
            "`tile` must be a number, or 2 of them. Received: tile=(16, 16, "
            "16).",
        ),
        (
            {"tile": 6},
            ValueError,
            "The sizes of `tile` must be multiples of 4, for the network "
            "divides by 2. Received: 6 x 6.",
        ),
        (
            {"image": np.zeros((1, 63, 64, 2))},
            ValueError,
            "The sizes of `image` must be multiples of 2, for the network "
            "divides by 2. Received: 63 x 64.",
        ),
    ],
)
def test_errors(given, kind, message):
    model = network(convolution(strides=2), layers.UpSampling2D())
    arguments = {"image": np.zeros(ROWS), "tile": 16, "halo": 8, **given}
    with helpers.raises(kind, message):
        tile_mismatch(model, **arguments, verbose=False)


@pytest.mark.parametrize(
    "given",
    [
        [np.zeros(ROWS[1:]), np.zeros((32, 32, 2))],
        (np.zeros(ROWS), np.zeros(ROWS[:3])),  # as for `fit`
    ],
)
def test_images_that_are_no_array(given):
    with pytest.raises(ValueError, match=r"^`image` must be one array"):
        tile_mismatch(network(convolution()), given, 16, 8, verbose=False)


def test_outputs_that_are_not_finite(rng):
    model = network(convolution(name="broken"))
    kernel, bias = model.get_weights()
    model.set_weights([kernel, np.full_like(bias, np.nan)])
    with helpers.raises(
        ValueError,
        "The outputs of `model` must be finite. Received: a prediction of "
        "'broken' that is not.",
    ):
        tile_mismatch(model, image(rng), 16, 8, verbose=False)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float64"])
def test_types_of_images(dtype, rng):
    given = rng.integers(0, 255, ROWS).astype(dtype)
    model = network(convolution(), layers.GroupNormalization(2), convolution())
    expected = tile_mismatch(
        model, given.astype("float32"), 16, 8, verbose=False
    )
    found = tile_mismatch(model, given, 16, 8, verbose=False)
    assert found.needed == expected.needed
    np.testing.assert_allclose(found.largest, expected.largest, 1e-3)


def test_tensors_and_an_input_with_a_name(rng):
    inputs = keras.Input((None, None, 2), name="scan")
    model = keras.Model({"scan": inputs}, convolution()(inputs))
    tensor = ops.cast(image(rng), "bfloat16")
    for given in (tensor, {"scan": tensor}):
        report = tile_mismatch(model, given, 16, 8, verbose=False)
        assert (report.largest, report.needed) == (0, (1, 1))


def test_tiles_that_are_all_alike_differ_from_the_whole():
    model = network(convolution(), layers.GroupNormalization(2, name="group"))
    report = tile_mismatch(model, np.ones(ROWS), 16, 8, verbose=False)
    assert report.largest == 0
    (verdict,) = report.verdicts
    assert verdict.layers == ("group",)
    assert "between tiles and the whole image" in verdict.reason


def test_a_window_that_is_the_image_needs_no_halo(rng):
    model = network(convolution(), layers.GroupNormalization(2))
    report = tile_mismatch(model, image(rng), 64, 0, verbose=False)
    assert (report.largest, report.verdicts) == (0, [])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: network(layers.Conv2D(1, 3)),
            "An output must have the sizes of the image",
        ),
        (
            lambda: network(layers.GlobalAveragePooling2D()),
            "An output must have the axes of the image",
        ),
        (
            lambda: network(convolution(), shape=(48, 48, 2)),
            "A tile with its halo must be the input of the model, whose size",
        ),
        (
            lambda: keras.Model(
                (one := [keras.Input((None, None, 2)) for _ in range(2)]),
                layers.Add()(one),
            ),
            "`model` must have one input. Received: 2 of",
        ),
    ],
)
def test_models_that_are_no_such_networks(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        tile_mismatch(make(), np.zeros(ROWS), 16, 8, verbose=False)


def test_a_layer_that_takes_no_size_that_is_unknown(rng):
    """A graph for windows and the whole image: some layers need their sizes."""
    inputs = keras.Input((None, None, 1))
    x = layers.Conv2D(2, 3, padding="same")(inputs)
    x = layers.UpSampling2D(2, interpolation="bilinear")(
        layers.MaxPooling2D(2)(x)
    )
    model = keras.Model(inputs, keras_renorm.BatchNormalization()(x))
    image = helpers.inputs_of(rng, (1, 64, 64, 1))
    report = tile_mismatch(model, image, 16, 8, verbose=False)
    assert report.verdicts == []


@pytest.mark.parametrize(("halo", "is_enough"), [(24, 1), (8, 0)])
def test_a_layer_that_reaches_far_does_not_see_everything(halo, is_enough, rng):
    """A quarter of a map of 64 pixels is nearer than 21."""
    model = network(
        convolution(), convolution(1, dilation_rate=20, name="dilated")
    )
    given = image(rng, (1, 96, 96, 2))
    if is_enough:
        report = tile_mismatch(model, given, 16, halo, verbose=False)
        assert (report.verdicts, report.needed) == ([], (21, 21))
    else:
        with pytest.warns(UserWarning, match="at least"):
            report = tile_mismatch(model, given, 16, halo, verbose=False)
        assert report.is_beyond == (True, True)
        assert [each.cause for each in report.verdicts] == [
            "the halo is too small"
        ]


def test_coarse_outputs_that_change_up_to_their_end(rng):
    between = [convolution() for _ in range(4)]
    model = network(convolution(strides=4), *between)
    with pytest.warns(UserWarning, match="at least"):
        report = tile_mismatch(model, image(rng), 8, 4, verbose=False)
    assert report.is_beyond == (True, True)


@pytest.mark.parametrize(("scale", "kernel"), [(2, 5), (4, 9)])
def test_what_finer_outputs_need(scale, kernel, rng):
    last = layers.Conv2D(1, kernel, padding="same")
    model = network(convolution(), layers.UpSampling2D(scale), last)
    report = tile_mismatch(model, image(rng), 16, 2, verbose=False)
    assert (report.needed, report.verdicts) == ((2, 2), [])
    assert report.largest == 0


@pytest.mark.parametrize(
    "between",
    [
        [
            layers.Reshape((-1, 4)),
            layers.Dense(3),
            layers.Softmax(),
            layers.Reshape((32, 32, 3)),
        ],
        [layers.Permute((3, 1, 2)), layers.Permute((2, 3, 1))],
        [layers.Lambda(lambda x: ops.reshape(x, (-1, 32, 64, 2)))],
    ],
)
def test_another_form_sees_nothing(between, rng):
    """Neither are its sizes those of an image."""
    if len(between) == 1:
        between.append(layers.Reshape((32, 32, 4)))
    model = network(convolution(), convolution(), *between, shape=(32, 32, 2))
    report = tile_mismatch(model, image(rng), 24, 4, verbose=False)
    assert (report.needed, report.verdicts) == ((2, 2), [])
    assert report.largest == 0


def test_attention_between_tokens(rng):
    inputs = keras.Input((32, 32, 2))
    maps = convolution(8, strides=4)(inputs)
    tokens = layers.Reshape((64, 8))(maps)
    tokens = layers.MultiHeadAttention(2, 4, name="attention")(tokens, tokens)
    maps = maps + layers.Reshape((8, 8, 8))(tokens)
    model = keras.Model(inputs, layers.UpSampling2D(4)(maps))
    report = tile_mismatch(model, image(rng), 16, 8, verbose=False)
    assert [each.layers for each in report.verdicts] == [("attention",)]


class Onto(layers.Layer):
    """Of two maps, the second as large as the first."""

    def call(self, maps):
        return ops.image.resize(maps[1], ops.shape(maps[0])[1:3])

    def compute_output_shape(self, shapes):
        return (*shapes[0][:3], shapes[1][-1])


@pytest.mark.skipif(
    not hasattr(layers, "AdaptiveMaxPooling2D"), reason="Keras is older"
)
def test_what_is_pooled_to_one_size_is_no_map(rng):
    inputs = keras.Input((None, None, 2))
    maps = convolution()(inputs)
    pools = [
        layers.AdaptiveMaxPooling2D(size, name=f"pool{size}")(maps)
        for size in (2, 3)
    ]
    together = [maps, *(Onto()([maps, pooled]) for pooled in pools)]
    label = layers.GlobalMaxPooling2D(keepdims=True)(maps)
    model = keras.Model(
        inputs,
        {
            "segments": layers.Concatenate()(together),
            "grid": convolution()(pools[0]),
            "odd": pools[1],
            "label": layers.Dense(3)(label),
        },
    )
    report = tile_mismatch(model, image(rng), 16, 8, verbose=False)
    assert [each.name for each in report.outputs] == ["segments"]
    (verdict,) = report.verdicts
    assert {"pool2", "pool3"} <= set(verdict.layers)


def test_factors_side_by_side(rng):
    inputs = keras.Input((None, None, 2))
    branches = [
        layers.UpSampling2D(size)(layers.AveragePooling2D(size)(inputs))
        for size in (2, 3)
    ]
    model = keras.Model(inputs, layers.Concatenate()(branches))
    with pytest.raises(ValueError, match=r"of `halo` must be multiples of 6"):
        tile_mismatch(model, np.zeros((1, 72, 72, 2)), 12, 9, verbose=False)


class Squeeze(layers.Layer):
    """It sees everything by an operation, not by the layer inside."""

    def __init__(self, axes=(1, 2), **arguments):
        super().__init__(**arguments)
        self.axes = axes
        self.dense = layers.Dense(4)

    def call(self, x):
        return x * self.dense(ops.mean(x, self.axes, keepdims=True))


@pytest.mark.parametrize("axes", [(1, 2), 1, 2])
def test_a_block_that_sees_everything_is_named(axes, rng):
    model = network(convolution(), Squeeze(axes, name="own"), convolution())
    given = image(rng) * np.linspace(0.2, 3, 64)[:, None]
    report = tile_mismatch(model, given, 16, 8, verbose=False)
    assert [each.layers for each in report.verdicts] == [("own",)]
    assert report.needed == (2, 2)


def test_a_layer_that_is_called_by_keyword(rng):
    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.first = convolution()
            self.group = layers.GroupNormalization(2, name="group")

        def call(self, x):
            return self.group(inputs=self.first(x))

    model = Model()
    model(image(rng))
    report = tile_mismatch(model, image(rng), 16, 8, verbose=False)
    assert [each.layers for each in report.verdicts] == [("group",)]


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_outputs_have_their_names(kind, rng):
    inputs = keras.Input((None, None, 2))
    outputs = kind(
        fine=convolution()(inputs), coarse=convolution(strides=2)(inputs)
    )
    model = keras.Model(inputs, outputs)
    report = tile_mismatch(model, image(rng), 16, 8, verbose=False)
    assert {each.name: each.map.shape[1] for each in report.outputs} == {
        "fine": 64,
        "coarse": 32,
    }


def test_a_block_that_reaches_far_is_not_named(rng):
    """Nor is it asked on a narrow map that it does not take."""

    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.first = convolution()
            self.deep = layers.Conv2D(4, 11, padding="same")
            self.pool, self.up = layers.MaxPooling2D(8), layers.UpSampling2D(8)

        def call(self, x):
            x = self.first(x)
            return x + self.up(self.deep(self.pool(x)))

    model = network(Block(), shape=(48, 48, 2))
    with pytest.warns(UserWarning, match="at least"):
        report = tile_mismatch(model, image(rng), 16, 16, verbose=False)
    assert [each.cause for each in report.verdicts] == ["the halo is too small"]
    assert report.is_beyond == (True, True)
