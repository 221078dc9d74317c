"""PyTorch's operators: each layout and type, against the reference."""

import gc
import weakref

import keras
import numpy as np
import pytest

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    revert,
)
from keras_renorm._step import choice, training
from keras_renorm._step.aten import AtenStep
from keras_renorm._step.plain import PlainStep
from tests import helpers
from tests.reference import Reference, from_rows, to_rows
from tests.test_corrected_gradient import examples_of
from tests.test_gate import assert_same_state, made

pytestmark = pytest.mark.torch
if keras.backend.backend() == "torch":
    import torch
    from torch.autograd import forward_ad

LAYOUTS = {
    "rows": ((6, 5), -1),
    "one row": ((1, 5), -1),
    "wide": ((3, 2, 70), -1),
    "images": ((4, 3, 5, 7), -1),
    "volumes": ((2, 3, 2, 4, 5), -1),
    "rank 6": ((2, 3, 2, 1, 2, 4), -1),
    "second": ((4, 7, 3, 5), 1),
    "between": ((4, 3, 7, 5), 2),
    "first": ((7, 4, 3), 0),
    "no other axis": ((5,), 0),
}
# Where a tensor lies in memory is another matter than its shape.
MEMORY = ("as it is", "turned", "sliced", "one value")
TOLERANCES = {
    "float64": 1e-11,
    "float32": 2e-5,
    "bfloat16": 0.03,
    "float16": 4e-3,
}


def lying(values, memory):
    """A tensor of these values that lies in memory in another way."""
    tensor = torch.tensor(values)
    if memory == "turned":
        axes = range(tensor.dim())[::-1]
        return tensor.permute(*axes).contiguous().permute(*axes)
    if memory == "sliced":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if memory == "one value":
        return torch.ones((), dtype=tensor.dtype).expand(tensor.shape)
    return tensor


def stepped(layer, inputs, upstream):
    """Outputs and gradients of a training step."""
    inputs = inputs.detach().requires_grad_()
    outputs = layer(inputs, training=True)
    weights = [weight.value for weight in layer.trainable_variables]
    return outputs, *torch.autograd.grad(outputs, [inputs, *weights], upstream)


@pytest.fixture
def steps(monkeypatch):
    """Which class each step was of, as a list."""
    found = []
    step_of = training._step_of

    def noted(*arguments):
        step = step_of(*arguments)
        found.append(type(step))
        return step

    monkeypatch.setattr(training, "_step_of", noted)
    return found


@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_batch_normalization(layout, memory, dtype, rng):
    shape, axis = LAYOUTS[layout]
    if memory == "one value" and dtype != "float32":
        pytest.skip("of the gradient only")
    layer = BatchNormalization(axis=axis, momentum=0.5, dtype=dtype)
    layer.build(shape)
    helpers.randomize(layer, rng)
    reference = Reference(shape[axis], layer.momentum, layer.epsilon)
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        value = helpers.to_numpy(getattr(layer, name)).astype("float64")
        setattr(reference, name, value)
    type_of = getattr(torch, dtype)
    inputs = lying(
        helpers.inputs_of(rng, shape, axis), memory.replace("one value", "")
    ).to(type_of)
    upstream = lying(rng.normal(size=shape), memory).to(type_of)
    actual = stepped(layer, inputs, upstream)
    rows = to_rows(inputs.double().numpy(), axis)
    arriving = to_rows(upstream.double().numpy(), axis)
    expected = [reference.normalize(rows), *reference.gradients(rows, arriving)]
    reference.move(rows)
    for index, value in enumerate(expected):
        if index < 2:
            assert actual[index].dtype == type_of
            value = from_rows(value, shape, axis)
        scale = np.abs(value).max()
        if scale > 1e-9:
            helpers.assert_close(
                actual[index].detach().double(), value, TOLERANCES[dtype]
            )
    statistics = 1e-11 if dtype == "float64" else 2e-5
    for name in ("moving_mean", "moving_variance"):
        helpers.assert_close(
            helpers.to_numpy(getattr(layer, name)).astype("float64"),
            getattr(reference, name),
            statistics,
        )


@pytest.mark.parametrize("memory", MEMORY[:3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("is_shut", [False, True])
def test_the_gated_step(is_shut, layout, memory, dtype, rng, steps):
    shape, axis = LAYOUTS[layout]
    if len(shape) == 1:
        pytest.skip("no axis of examples")
    layer, reference = made(shape, rng, step=120, axis=axis, dtype=dtype)
    if is_shut:  # as where data are sorted
        reference.gate = np.array([0.5, 1.0, 16.0, 0.99])
        layer.gate.assign(reference.gate)
    for _ in range(2):
        assert (reference.opening() == 0) == is_shut
        inputs = helpers.inputs_of(rng, shape, axis, dtype)
        upstream = rng.normal(size=shape).astype(dtype)
        actual = stepped(layer, lying(inputs, memory), lying(upstream, memory))
        expected = reference.gated_step(
            to_rows(inputs, axis).astype("float64"),
            to_rows(upstream, axis).astype("float64"),
            examples_of(shape, axis),
        )
        tolerance = 1e-10 if dtype == "float64" else 1e-4
        for index, value in enumerate(expected):
            if index < 2:
                value = from_rows(value, shape, axis)
            helpers.assert_close(
                actual[index].detach().double(), value, tolerance
            )
        assert_same_state(layer, reference, tolerance)
    # The variance of one is 0, and of many channels one's is small.
    if layout not in ("one row", "wide"):
        assert set(steps) == {AtenStep}


def test_large_images(rng):
    x = rng.normal(size=(1, 1024, 1024, 2)).astype("float32")
    upstream = rng.uniform(0.0, 0.1, x.shape).astype("float32")
    layer = BatchNormalization(momentum=0.0)
    layer(torch.tensor(x), training=True).backward(torch.tensor(upstream))
    rows, gradients = (
        each.reshape(-1, 2).astype("float64") for each in (x, upstream)
    )
    for value, expected in (
        (layer.moving_variance, rows.var(axis=0)),
        (layer.beta.value.grad, gradients.sum(axis=0)),
    ):
        value = helpers.to_numpy(value)
        np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("layer", [BatchNormalization, BatchRenormalization])
def test_large_means(layer, rng, steps):
    """Where a mean is large, its digits are not lost."""
    shape = (64, 8, 8, 3)
    means = np.array([0.0, 1e4, -1e6])
    inputs = (rng.normal(size=shape) + means).astype("float32")
    layer = layer(momentum=0.0)
    actual = stepped(layer, torch.tensor(inputs), torch.ones(shape))
    rows = to_rows(inputs.astype("float64"), -1)
    expected = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + layer.epsilon)
    helpers.assert_close(
        actual[0].detach().double(), from_rows(expected, shape, -1), 2e-6
    )
    helpers.assert_close(
        helpers.to_numpy(layer.moving_mean).astype("float64"),
        rows.mean(0),
        1e-7,
    )
    assert steps == [PlainStep]


def test_which_inputs_the_operators_take():
    def path(inputs, mask=None):
        return choice.choose(inputs, 1, mask)

    floats = torch.ones(3, 4)
    assert path(floats) == "aten"
    assert path(floats.bfloat16()) == "aten"
    assert path(floats, floats > 0) == "plain"
    assert path(floats.int()) == "plain"
    assert path(floats[:0]) == "plain"
    assert path(floats.to("meta")) == "plain"


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("layer", [BatchNormalization, BatchRenormalization])
def test_no_example_and_one(layer, count):
    layer = layer()
    layer.build((None, 3))
    before = helpers.statistics(layer)
    inputs = torch.full((count, 3), 7.0)
    outputs, d_inputs, *_ = stepped(layer, inputs, torch.ones(count, 3))
    assert outputs.shape == d_inputs.shape == (count, 3)
    assert torch.isfinite(outputs).all()
    if count == 0:
        for value, old in zip(helpers.statistics(layer), before, strict=True):
            assert np.array_equal(value, old)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"scale": False}, {"center": False}])
@pytest.mark.parametrize("kind", ["normalization", "algorithm 1", "gated"])
def test_second_derivatives(kind, arguments, training, rng):
    """They are those of plain operations, which a mask asks for."""
    make = {
        "normalization": BatchNormalization,
        "algorithm 1": lambda **given: BatchRenormalization(
            r_max=1.5, d_max=0.5, **given
        ),
        "gated": BatchRenormalization,
    }[kind]
    if "scale" in arguments and not training:
        pytest.skip("there is none")
    values = rng.normal(size=(6, 3, 4))
    upstream = torch.tensor(rng.normal(size=values.shape))
    direction = torch.tensor(rng.normal(size=values.shape))
    found = []
    for mask in (None, torch.ones(6, 3, dtype=torch.bool)):
        layer = make(dtype="float64", **arguments)
        layer.build(values.shape)
        layer.moving_variance.assign(np.full(4, 2.0))
        inputs = torch.tensor(values, requires_grad=True)
        weights = [weight.value for weight in layer.trainable_variables]
        outputs = layer(inputs, training=training, mask=mask)
        first = torch.autograd.grad(
            outputs, [inputs, *weights], upstream, create_graph=True
        )
        sum_of = sum((each**2).sum() for each in first)
        second = torch.autograd.grad(
            sum_of + (first[0] * direction).sum(),
            [inputs, *weights],
            allow_unused=True,
            materialize_grads=True,
        )
        found.append([*first, *second])
    for actual, expected in zip(*found, strict=True):
        if expected.abs().max() > 1e-12:
            helpers.assert_close(actual.detach(), expected.detach(), 1e-9)


# PyTorch's own, of its forward mode.
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [BatchNormalization, BatchRenormalization])
def test_forward_mode_and_transforms(layer, training, rng):
    """They take plain operations, and remember nothing."""
    layer = layer(dtype="float64")
    layer.build((None, 3))
    learned = [each.value.detach() for each in layer.trainable_variables]
    state = [
        each.value.detach().clone() for each in layer.non_trainable_variables
    ]

    def of(inputs):
        return layer.stateless_call(learned, state, inputs, training=training)[
            0
        ]

    inputs = torch.tensor(rng.normal(size=(5, 3)))
    direction = torch.tensor(rng.normal(size=(5, 3)))
    step = 1e-6
    expected = of(inputs + step * direction) - of(inputs - step * direction)
    expected = (expected / (2 * step)).detach()
    _, by_function = torch.func.jvp(of, (inputs,), (direction,))
    helpers.assert_close(by_function.detach(), expected, 1e-6)
    with forward_ad.dual_level():
        dual = of(forward_ad.make_dual(inputs, direction))
        by_dual = forward_ad.unpack_dual(dual).tangent
    helpers.assert_close(by_dual.detach(), expected, 1e-6)
    (wanted,) = torch.autograd.grad(
        of(inputs.requires_grad_()), inputs, direction
    )
    gradient = torch.func.grad(lambda x: (of(x) * direction).sum())(inputs)
    if not isinstance(layer, BatchRenormalization):  # that has a memory
        helpers.assert_close(gradient.detach(), wanted, 1e-9)
    pair = torch.stack([inputs, 2 * inputs]).detach()
    both = torch.func.vmap(of)(pair)
    helpers.assert_close(both[1].detach(), of(2 * inputs).detach(), 1e-9)
    with torch.no_grad():  # where NumPy computes else
        both = torch.func.vmap(of)(pair)
    helpers.assert_close(both[1], of(2 * inputs).detach(), 1e-9)


@pytest.mark.parametrize("memory", MEMORY[:3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_inference(layout, memory, dtype, rng):
    shape, axis = LAYOUTS[layout]
    layer = BatchNormalization(axis=axis, dtype=dtype)
    layer.build(shape)
    helpers.randomize(layer, rng)
    inputs = lying(helpers.inputs_of(rng, shape, axis), memory)
    inputs = inputs.to(getattr(torch, dtype)).requires_grad_()
    outputs = layer(inputs)
    upstream = torch.ones_like(outputs)
    (d_inputs,) = torch.autograd.grad(outputs, inputs, upstream)
    mean, variance = (
        from_rows(
            np.broadcast_to(
                value, to_rows(inputs.detach().double().numpy(), axis).shape
            ),
            shape,
            axis,
        )
        for value in helpers.statistics(layer)
    )
    gamma, beta = (
        from_rows(
            np.broadcast_to(helpers.to_numpy(value), to_rows(mean, axis).shape),
            shape,
            axis,
        )
        for value in (layer.gamma, layer.beta)
    )
    scale = gamma / np.sqrt(variance + layer.epsilon)
    expected = (inputs.detach().double().numpy() - mean) * scale + beta
    assert outputs.dtype == inputs.dtype
    helpers.assert_close(outputs.detach().double(), expected, TOLERANCES[dtype])
    helpers.assert_close(d_inputs.double(), scale, TOLERANCES[dtype])


def test_where_statistics_are_not_shared_processes_are_an_error(monkeypatch):
    """`synchronized` is asked for on each path."""
    from torch import distributed

    for name, value in (
        ("is_available", True),
        ("is_initialized", True),
        ("get_world_size", 2),
    ):
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    layer = BatchNormalization(synchronized=True)
    layer.build((None, 3))
    with pytest.raises(RuntimeError, match="several processes"):
        layer(torch.ones(4, 3), training=True)


@pytest.mark.parametrize("is_differentiated", [True, False])
@pytest.mark.parametrize("arguments", [None, {"gradient_momentum": None}, {}])
def test_a_step_leaves_nothing_in_memory(arguments, is_differentiated):
    layer = BatchNormalization()
    if arguments is not None:
        layer = BatchRenormalization(**arguments)
    inputs = torch.ones(4, 3, requires_grad=True)
    outputs = layer(inputs, training=True)
    found = weakref.ref(inputs)
    if is_differentiated:
        outputs.sum().backward()
    del inputs, outputs
    gc.collect()
    assert found() is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layer", [BatchNormalization, BatchRenormalization])
def test_inputs_that_were_written_over_are_an_error(layer, training, rng):
    """As with PyTorch's own layer; the gradient would be of other inputs."""
    inputs = torch.tensor(helpers.inputs_of(rng, (6, 3)), requires_grad=True)
    hidden = inputs * 2.0
    outputs = layer()(hidden, training=training)
    hidden.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (outputs**3).sum().backward()


@pytest.mark.parametrize("layer", [BatchNormalization, BatchRenormalization])
def test_statistics_move_between_inference_and_its_gradient(layer, rng):
    layer = layer()
    layer.build((None, 5))
    helpers.randomize(layer, rng)
    inputs = torch.tensor(
        rng.normal(size=(4, 5)), dtype=torch.float32, requires_grad=True
    )
    weights = [inputs, layer.gamma.value, layer.beta.value]
    loss = layer(inputs).square().sum()
    expected = torch.autograd.grad(loss, weights)
    loss = layer(inputs).square().sum()
    layer(inputs, training=True)  # another loss of the same step
    for value, right in zip(
        torch.autograd.grad(loss, weights), expected, strict=True
    ):
        assert torch.equal(value, right)


@pytest.mark.parametrize("layer", [BatchNormalization, BatchRenormalization])
def test_statistics_are_constants_whoever_asks_for_gradients(layer, rng):
    """`requires_grad_(True)` of a whole network asks for theirs, too."""
    model = keras.Sequential([keras.Input((3,)), layer()])
    x = torch.tensor(helpers.inputs_of(rng, (6, 3)))
    expected = model(x).detach()
    model.requires_grad_(False)
    model.requires_grad_(True)
    assert torch.equal(model(x).detach(), expected)
    model.layers[0].frozen_statistics = True
    helpers.assert_close(model(x, training=True).detach(), expected, 1e-6)


@pytest.mark.parametrize("in_place", [True, False])
def test_torch_sees_the_variables_of_converted_layers(in_place, rng):
    block = keras.Sequential([keras.layers.BatchNormalization(name="bn")])
    model = keras.Sequential([keras.Input((3,)), block, keras.layers.Dense(1)])
    list(model.parameters())
    for change in (convert, revert):
        model = change(model, in_place=in_place)
        known = set(map(id, model.parameters()))
        assert {id(each.value) for each in model.variables} <= known
        model(torch.ones(4, 3) * 5.0, training=True)
        (mean,) = {
            tuple(value.numpy())
            for name, value in model.state_dict().items()
            if name.endswith("moving_mean")
        }
        layer = model.layers[0].layers[0]
        helpers.assert_close(layer.moving_mean, np.array(mean), 1e-6)
        assert np.any(mean)
