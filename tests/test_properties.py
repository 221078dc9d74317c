"""Any layer, on any input, is the float64 reference.

Hypothesis draws layers and inputs: by default the same ones at each run; with
`-m exhaustive` many more, and others each time.
"""

import random
from dataclasses import dataclass
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_renorm import BatchNormalization, BatchRenormalization
from keras_renorm._step import choice
from tests import helpers
from tests.reference import Reference, from_rows, to_rows

IS_TENSORFLOW = keras.backend.backend() == "tensorflow"
if IS_TENSORFLOW:
    import tensorflow as tf

QUICK = settings(
    # JAX compiles each shape anew.
    max_examples=100 if IS_TENSORFLOW else 20,
    derandomize=True,
    deadline=None,
    database=None,
)
THOROUGH = settings(max_examples=1_500, deadline=None, database=None)
# Of each policy: the rounding of what the layer returns, beside the largest
# value that the formula passes through.
TOLERANCES = {
    "float64": 1e-11,
    "float32": 2e-5,
    "mixed_float16": 3e-3,
    "mixed_bfloat16": 2e-2,
    "float16": 3e-3,
    "bfloat16": 2e-2,
}


@dataclass
class Case:
    """A layer, its input, and which sizes the graph does not know."""

    kind: Any
    arguments: dict[str, Any]
    shape: tuple[int, ...]
    mask: np.ndarray | None
    unknown: frozenset[int]
    unknown_of_mask: frozenset[int]
    is_fused: bool
    seed: int

    @property
    def axis(self):
        return self.arguments["axis"] % len(self.shape)

    @property
    def limits(self):
        return (
            self.arguments.get("r_max", 1.0),
            self.arguments.get("d_max", 0.0),
        )


def make_mask(choose, sizes):
    """Of some of the leading axes, each whole or one for all; or none."""
    rank = choose([0, choose(range(len(sizes) + 1))])
    if rank == 0:
        return None
    shape = tuple(choose([size, 1]) for size in sizes[:rank])
    rng = np.random.default_rng(choose(range(100)))
    kept = rng.random(shape) < choose([0.8, 0.3, 1.0, 0.0])
    return kept.astype(choose(["bool", "int32", "float32"]))


def make_case(choose):
    """A case, with `choose` to pick one of a sequence."""
    rank = choose(range(2, 6))
    shape = (
        choose(range(1, 10)),
        *(choose(range(1, 5)) for _ in range(rank - 1)),
    )
    axis = choose([-1, choose(range(-rank, rank))])
    sizes = [size for at, size in enumerate(shape) if at != axis % rank]
    kind = choose([BatchNormalization, BatchRenormalization])
    arguments = {
        "axis": axis,
        "momentum": choose([0.7, 0.99, 1.0, 0.0]),
        "epsilon": choose([1e-3, 1e-5, 1.0]),
        "center": choose([True, False]),
        "scale": choose([True, False]),
        "dtype": choose(list(TOLERANCES)),
    }
    if axis % rank:  # else the groups would be of channels
        groups = choose([None, *range(1, shape[0] + 2)])
        arguments["virtual_batch_size"] = choose([None, groups])
    if kind is BatchRenormalization:
        arguments["r_max"] = choose([1.2, 1.0, 3.0, np.inf])
        arguments["d_max"] = choose([0.3, 0.0, 5.0, np.inf])
    mask = make_mask(choose, sizes)

    def some(axes):
        return frozenset(at for at in axes if choose([False, True]))

    return Case(
        kind,
        arguments,
        shape,
        mask,
        some(range(rank)) - {axis % rank},  # the layer must know its channels
        some(range(0 if mask is None else mask.ndim)),
        choose([False, True]),
        choose(range(2**16)),
    )


@st.composite
def cases(draw):
    return make_case(lambda options: draw(st.sampled_from(options)))


def run(layer, case, inputs, upstream, jit_compile):
    """Outputs and gradients, from a graph with the sizes that are known."""
    is_known = not (case.unknown or case.unknown_of_mask)
    if not IS_TENSORFLOW or (is_known and not jit_compile):
        return helpers.gradients(layer, inputs, upstream, case.mask)
    sizes = [
        None if at in case.unknown else size
        for at, size in enumerate(case.shape)
    ]
    spec = tf.TensorSpec(sizes, inputs.dtype)
    signature = [spec, spec]
    arguments = [inputs, upstream]
    if case.mask is not None:
        sizes = [
            None if at in case.unknown_of_mask else size
            for at, size in enumerate(case.mask.shape)
        ]
        signature.append(tf.TensorSpec(sizes, case.mask.dtype))
        arguments.append(tf.constant(case.mask))

    @tf.function(input_signature=signature, jit_compile=jit_compile)
    def step(inputs, upstream, mask=None):
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            outputs = layer(inputs, training=True, mask=mask)
        weights = [weight.value for weight in layer.trainable_variables]
        gradients = tape.gradient(
            outputs, [inputs, *weights], output_gradients=upstream
        )
        return outputs, gradients[0], gradients[1:]

    return step(*arguments)


def to_float64(tensor):
    return helpers.to_numpy(ops.cast(tensor, "float64"))


def assert_near(actual, expected, scale, tolerance, name):
    error = np.abs(to_float64(actual) - expected).max(initial=0.0)
    assert error <= tolerance * max(scale, 1e-30), f"{name}: {error} of {scale}"


def check(case, jit_compile=False):
    rng = np.random.default_rng(case.seed)
    layer = case.kind(**case.arguments)
    layer.build(
        tuple(
            None if at in case.unknown else size
            for at, size in enumerate(case.shape)
        )
    )
    helpers.randomize(layer, rng)
    reference = Reference(
        case.shape[case.axis],
        case.arguments["momentum"],
        case.arguments["epsilon"],
    )
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        if getattr(layer, name) is not None:
            setattr(reference, name, to_float64(getattr(layer, name)))
    # What the layer sees, so that only its own rounding counts.
    dtype = layer.compute_dtype
    inputs = helpers.inputs_of(rng, case.shape, case.axis, "float64")
    upstream = ops.cast(rng.normal(size=case.shape), dtype)
    kept = np.ones(case.shape, bool)
    if case.mask is not None:
        mask = case.mask.astype(bool)
        mask = mask.reshape(
            mask.shape + (1,) * (len(case.shape) - 1 - mask.ndim)
        )
        kept = np.broadcast_to(np.expand_dims(mask, case.axis), case.shape)
        inputs[~kept] = np.nan
    inputs = ops.cast(inputs, dtype)
    small = 0 if case.is_fused else choice.SMALL_ELEMENTS
    with mock.patch.object(choice, "SMALL_ELEMENTS", small):
        actual = run(layer, case, inputs, upstream, jit_compile)
    assert keras.backend.standardize_dtype(actual[0].dtype) == dtype
    compare(
        layer,
        reference,
        case,
        to_float64(inputs),
        np.where(kept, to_float64(upstream), 0.0),
        kept,
        actual,
    )


def compare(layer, reference, case, inputs, upstream, kept, actual):
    """Group by group, then the statistics of all of it."""
    outputs, d_inputs, d_weights = actual
    outputs, d_inputs = to_float64(outputs), to_float64(d_inputs)
    tolerance = TOLERANCES[case.arguments["dtype"]]
    size = case.arguments.get("virtual_batch_size") or len(inputs)
    size = len(inputs) if case.axis == 0 else size
    channels = case.shape[case.axis]
    d_gamma, d_beta = np.zeros((2, channels))
    gamma_scale = 0.0
    for begin in range(0, len(inputs), size):
        part = slice(begin, begin + size)
        shape = inputs[part].shape
        is_kept = to_rows(kept[part], case.axis)[:, 0]
        rows, d_rows = (
            to_rows(each[part], case.axis)[is_kept]
            for each in (inputs, upstream)
        )
        if not len(rows):
            continue
        r, d = reference.correction(rows, *case.limits)
        expected = reference.normalize(rows, r, d)
        gradients = reference.gradients(rows, d_rows, r, d)
        assert_near(
            to_rows(outputs[part], case.axis)[is_kept],
            expected,
            # What it is a sum of may cancel.
            np.max(np.abs(expected))
            + np.max(np.abs(reference.beta))
            + np.max(np.abs(reference.gamma * d)),
            tolerance,
            "outputs",
        )
        sigma = np.sqrt(rows.var(axis=0) + reference.epsilon)
        whole = np.zeros((len(is_kept), channels))
        whole[is_kept] = gradients[0]
        assert_near(
            d_inputs[part],
            from_rows(whole, shape, case.axis),
            np.max(np.abs(d_rows * reference.gamma * r / sigma)),
            tolerance,
            "gradient of the inputs",
        )
        d_gamma += gradients[1]
        d_beta += gradients[2]
        gamma_scale += np.max(
            np.sum(np.abs(d_rows), axis=0)
            * (np.max(np.abs((rows - rows.mean(0)) / sigma * r), 0) + np.abs(d))
        )
    names = [weight.name for weight in layer.trainable_variables]
    for name, actual_gradient in zip(names, d_weights, strict=True):
        assert_near(
            actual_gradient,
            {"gamma": d_gamma, "beta": d_beta}[name],
            {"gamma": gamma_scale, "beta": np.sum(np.abs(upstream))}[name],
            # The fused operators round what they sum.
            tolerance,
            f"gradient of {name}",
        )
    rows = to_rows(inputs, case.axis)[to_rows(kept, case.axis)[:, 0]]
    if len(rows):
        reference.train(rows)
    for name in ("moving_mean", "moving_variance"):
        value = getattr(reference, name)
        assert_near(
            getattr(layer, name),
            value,
            np.max(np.abs(value)) + np.max(np.abs(rows), initial=0.0),
            min(tolerance, TOLERANCES["float32"]),
            name,
        )


@pytest.mark.slow
@QUICK
@given(st.integers(0, 2**32))
def test_a_training_step_equals_the_reference(seed):
    # Not `cases()`: five of six of its first examples vary one another.
    check(make_case(random.Random(seed).choice))


@pytest.mark.exhaustive
@THOROUGH
@given(cases())
def test_many_training_steps_equal_the_reference(case):
    check(case)


@pytest.mark.exhaustive
@pytest.mark.tensorflow
@settings(THOROUGH, max_examples=200)
@given(cases())
def test_training_steps_under_xla_equal_the_reference(case):
    check(case, jit_compile=True)
