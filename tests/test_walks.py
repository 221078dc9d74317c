"""Random walks through the life of a model: convert, train, save, load, fold.

By default the same few; with `-m exhaustive` others at each run.
"""

import random
import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from keras_renorm import (
    BatchNormalization,
    BatchRenormalization,
    convert,
    fold,
    freeze_statistics,
    revert,
    unfreeze_statistics,
)
from tests import helpers, networks

KERAS = layers.BatchNormalization
CLASSES = [KERAS, BatchNormalization, BatchRenormalization]
# Weights that no other class has.
OF_RENORMALIZATION = (
    *("step", "limit_values", "limit_steps"),
    *("gradient_mean", "gradient_projection", "gradient_agreement"),
    *("last_mean", "last_gradient", "gate", "gated", "seen_gate"),
)


@keras.saving.register_keras_serializable(package="tests")
class Mixed(networks.Block):
    """A block with a normalization of its configuration, and its own layers."""

    def __init__(self, normalization, **arguments):
        super().__init__(normalization, **arguments)
        self.dense = layers.Dense(4, name="own_dense")

    def build(self, input_shape):
        for layer in (self.dense, self.normalization):
            if not layer.built:  # as it is in a file
                layer.build(input_shape)

    def call(self, inputs, training=None):
        return self.dense(super().call(inputs, training=training))


def network(choice):
    """A network of a few parts, drawn."""
    count = iter(range(100))

    def bn(**arguments):
        kind = choice(CLASSES)
        arguments |= choice([{}, {"momentum": 0.6}, {"scale": False}])
        if kind is BatchRenormalization:
            arguments |= choice([{}, {"r_max": 2.0, "d_max": 1.0}])
        return kind(name=f"bn_{next(count)}", **arguments)

    def nested():
        inputs = keras.Input((4,))
        x = bn()(layers.Dense(4, use_bias=choice([True, False]))(inputs))
        return keras.Model(inputs, x, name=f"nested_{next(count)}")

    def sequence():
        return keras.Sequential(
            [keras.Input((4,)), layers.Dense(4), bn(), layers.ReLU()],
            name=f"sequence_{next(count)}",
        )

    def mixed():
        return Mixed(bn(), name=f"mixed_{next(count)}")

    parts = [bn, nested, sequence, mixed]
    inputs = keras.Input((4,))
    x = inputs
    for _ in range(choice([2, 3])):
        part = choice(parts)()
        x = part(x) + (part(x) if choice([False, False, True]) else x)
    x = bn()(layers.Dense(4, name="last")(x))
    return keras.Model(inputs, x, name="walker")


class Walk:
    """A model, and what must stay as it is from step to step."""

    def __init__(self, seed):
        self.draw = random.Random(seed)
        self.rng = np.random.default_rng(seed)
        self.x = helpers.inputs_of(self.rng, (12, 4))
        self.model = networks.randomize(network(self.draw.choice), self.rng)
        # What Keras writes into no file: flags of what is inside a layer.
        self.has_flags = False
        self.log = []

    def run(self, steps):
        self.compile()
        for _ in range(steps):
            step = self.draw.choice(
                [
                    self.convert,
                    self.convert,
                    self.revert,
                    self.revert,
                    self.train,
                    self.freeze,
                    self.adapt,
                    self.load,
                    self.resume,
                    self.fold,
                    self.compile,
                ]
            )
            self.log.append(step.__name__)
            step()

    def compile(self):
        self.model.compile(
            self.draw.choice(
                [keras.optimizers.SGD(0.01), keras.optimizers.Adam(0.01)]
            ),
            "mse",
            run_eagerly=True,
        )

    def outputs(self, model=None):
        return helpers.to_numpy((model or self.model)(self.x, training=False))

    def flags(self):
        """What trains: variables by path, and layers by place."""
        return (
            {
                variable.path: variable.trainable
                for variable in self.model.variables
                if variable.path.split("/")[-1] not in OF_RENORMALIZATION
            },
            sorted(
                v.path for v in helpers.learned(self.model.trainable_variables)
            ),
            [
                (layer.name, layer.trainable)
                for layer in self.model._flatten_layers()
            ],
        )

    def replace(self, function, **options):
        expected, flags = self.outputs(), self.flags()
        config = self.model.optimizer.get_config()
        names = [each.name for each in networks.normalizations(self.model)]
        if self.draw.random() < 0.4:
            options["layers"] = self.draw.sample(
                names, self.draw.randint(1, len(names))
            )
        options["in_place"] = self.draw.choice([True, False])
        self.log.append(options)
        old = self.model
        with warnings.catch_warnings(record=True) as said:
            warnings.filterwarnings("always", "Compile walker before")
            self.model = function(old, **options)
        if said:  # on JAX the optimizer does not know what came in place
            self.compile()
            config = self.model.optimizer.get_config()
        assert (self.model is old) == options["in_place"]
        helpers.assert_close(self.outputs(), expected, 1e-5)
        assert self.flags() == flags
        assert self.model.optimizer.get_config() == config
        for layer in networks.normalizations(self.model):
            if layer.name in options.get("layers", names):
                assert type(layer) is options.get("to", KERAS)

    def convert(self):
        options = {"to": self.draw.choice(CLASSES[1:])}
        if self.draw.random() < 0.3:
            options["momentum"] = self.draw.choice([0.5, 0.9])
        if self.draw.random() < 0.3:
            options["frozen_statistics"] = self.draw.choice([True, False])
        self.replace(convert, **options)

    def revert(self):
        self.replace(revert)

    def train(self):
        before = [(v, helpers.to_numpy(v)) for v in self.model.variables]
        trained = {id(v) for v in self.model.trainable_variables}
        y = np.ones((12, 4), "float32")
        if not trained:
            return
        self.model.train_on_batch(self.x, y)
        moved = {
            id(variable)
            for variable, value in before
            if not np.array_equal(value, helpers.to_numpy(variable))
        }
        still = {
            id(variable)
            for variable, _ in before
            if id(variable) not in trained
            and variable.name in ("gamma", "beta", "kernel", "bias")
        }
        assert moved & trained
        assert not moved & still
        assert np.all(np.isfinite(self.outputs()))

    def freeze(self):
        """Of a layer, of a variable, or of statistics; or the other way."""
        held = [
            layer
            for layer in self.model._flatten_layers(include_self=False)
            if layer.trainable_variables
        ]
        flag = self.draw.choice([False, False, True])
        kind = self.draw.choice(["layer", "variable", "statistics"])
        if kind == "layer" and held:
            self.draw.choice(held).trainable = flag
        elif kind == "variable" and held:
            layer = self.draw.choice(held)
            variables = helpers.learned(layer.trainable_variables)
            self.draw.choice(variables).trainable = flag
        elif ours := [
            each
            for each in networks.normalizations(self.model)
            if type(each) is not KERAS
        ]:
            change = self.draw.choice([freeze_statistics, unfreeze_statistics])
            change(self.model, layers=ours)
        self.log.append((kind, flag))
        self.has_flags = True
        self.compile()

    def adapt(self):
        """LoRA, of a dense layer in a graph."""
        dense = [
            layer
            for layer in self.model._flatten_layers()
            if isinstance(layer, layers.Dense) and not layer.lora_enabled
        ]
        if not dense:
            return
        expected = self.outputs()
        self.draw.choice(dense).enable_lora(1)
        helpers.assert_close(self.outputs(), expected, 1e-6)
        self.has_flags = True
        self.compile()

    def saved(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.keras"
            self.model.save(path)
            with warnings.catch_warnings():
                # As Keras says of each model that has not trained yet.
                warnings.filterwarnings("ignore", "Skipping variable loading")
                return keras.saving.load_model(path)

    def load(self):
        """Where Keras's file says all: no flags, no weights of LoRA."""
        if self.has_flags:
            return
        expected = self.outputs()
        self.model = self.saved()
        helpers.assert_close(self.outputs(), expected, 1e-6)

    def resume(self):
        if self.has_flags:
            return
        other = self.saved()
        y = np.ones((12, 4), "float32")
        for each in (self.model, other):
            each.train_on_batch(self.x, y)
        helpers.assert_close(self.outputs(other), self.outputs(), 1e-5)
        self.model = other

    def fold(self):
        expected = self.outputs()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*are not folded")
            folded = fold(self.model)
        helpers.assert_close(self.outputs(folded), expected, 1e-4)
        assert folded.output_names == self.model.output_names
        helpers.assert_close(self.outputs(), expected, 0)


def walk(seed, steps=8):
    drawn = Walk(seed)
    try:
        drawn.run(steps)
    except Exception as error:
        error.add_note(f"After {drawn.log}.")
        raise
    finally:
        keras.backend.clear_session()


@pytest.mark.parametrize("seed", [3, 1, 2, 4])
def test_a_walk(seed):
    walk(seed)


@pytest.mark.exhaustive
@settings(max_examples=500, deadline=None, database=None)
@given(st.integers(0, 2**32))
def test_many_walks(seed):
    walk(seed)
