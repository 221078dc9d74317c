"""Exported networks, run by the runtimes that they are exported for."""

import warnings

import keras
import numpy as np
import pytest

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    fold,
    revert,
)
from tests import helpers, networks

pytestmark = [pytest.mark.slow, pytest.mark.tensorflow]

FORMS = {
    "converted": convert,
    "converted to plain": lambda model: convert(model, to=BatchNormalization),
    "reverted": lambda model: revert(convert(model)),
    "folded": lambda model: quietly(fold, convert(model)),
}


def quietly(function, *arguments, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **named)


def run_saved_model(path, inputs):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    outputs = loaded.serve(tf.constant(inputs))
    return [np.asarray(each) for each in keras.tree.flatten(outputs)]


def run_litert(path, inputs):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=path)
    (given,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(given["index"], inputs.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(given["index"], inputs)
    interpreter.invoke()
    made = sorted(
        interpreter.get_output_details(), key=lambda each: each["name"]
    )
    return [interpreter.get_tensor(each["index"]) for each in made]


def run_onnx(path, inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(
        path, providers=["CPUExecutionProvider"]
    )
    (given,) = session.get_inputs()
    return session.run(None, {given.name: inputs})


RUNTIMES = {
    "tf_saved_model": ("", run_saved_model),
    "litert": (".tflite", run_litert),
    "onnx": (".onnx", run_onnx),
}


def assert_runs(model, runtime, inputs, expected, folder):
    if runtime not in keras.Model.export.__doc__:
        pytest.skip(f"Keras {keras.__version__} does not export to {runtime}")
    suffix, run = RUNTIMES[runtime]
    path = str(folder / f"model{suffix}")
    model(inputs)  # Keras exports to ONNX only what was called
    quietly(model.export, path, format=runtime, verbose=False)
    outputs = quietly(run, path, inputs)
    for output, wanted in zip(outputs, expected, strict=True):
        helpers.assert_close(output, wanted, 1e-5)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "network", [networks.sequential, networks.residual, networks.nested]
)
def test_exports_give_the_networks_outputs(
    network, form, runtime, rng, tmp_path
):
    model = networks.randomize(network(keras.layers.BatchNormalization), rng)
    inputs = networks.data_of(model, rng)
    expected = networks.outputs_of(model, inputs)
    assert_runs(FORMS[form](model), runtime, inputs, expected, tmp_path)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_pretrained_architecture_folded(runtime, rng, tmp_path):
    model = keras.applications.MobileNetV2(
        weights=None, include_top=False, input_shape=(64, 64, 3)
    )
    networks.randomize_mildly(model, rng)
    inputs = rng.uniform(-1, 1, (2, 64, 64, 3)).astype("float32")
    expected = networks.outputs_of(model, inputs)
    folded = fold(convert(model))
    assert not networks.normalizations(folded)
    assert_runs(folded, runtime, inputs, expected, tmp_path)


def test_a_training_step_is_exported_with_its_state(tmp_path, rng):
    import tensorflow as tf

    class Trained(tf.Module):
        def __init__(self):
            self.layer = BatchRenormalization(
                momentum=0.9, r_max=3.0, d_max=5.0, gradient_momentum=0.9
            )
            self.layer.build((None, 40, 40, 16))
            self.states = [weight.value for weight in self.layer.weights]

        @tf.function(input_signature=[tf.TensorSpec((None, 40, 40, 16))])
        def step(self, x):
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_mean(self.layer(x, training=True) ** 3)
            return loss, tape.gradient(loss, x)

    trained = Trained()
    tf.saved_model.save(trained, str(tmp_path))
    loaded = tf.saved_model.load(str(tmp_path))
    inputs = tf.constant(helpers.inputs_of(rng, (8, 40, 40, 16)))
    losses = []
    for _ in range(3):  # r, d and so the loss follow the moving statistics
        for found, expected in zip(
            loaded.step(inputs), trained.step(inputs), strict=True
        ):
            helpers.assert_close(found, expected, 1e-6)
        losses.append(float(trained.step(inputs)[0]))
        loaded.step(inputs)
    assert len(set(losses)) == 3
