"""`fit` on two JAX processes, each with half of every batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

import keras_renorm
from tests import helpers

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "tutorials" / "10_several_hosts_jax.py"


def run(processes, output):
    """Runs that many to their end; the model and the losses of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [
                *(sys.executable, str(TUTORIAL), "--output", str(output)),
                *("--processes", str(processes), "--process", str(process)),
                *("--coordinator", coordinator),
                *("--steps", "5", "--epochs", "2"),
            ],
            # Two devices in each, as on hosts with two GPUs (`XLA_FLAGS` in
            # conftest.py).
            env={**os.environ, "KERAS_BACKEND": "jax"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(processes)
    ]
    try:
        printed = [each.communicate(timeout=600)[0] for each in started]
    finally:
        for each in started:
            each.kill()
    for each, text in zip(started, printed, strict=True):
        assert each.returncode == 0, text[-3000:]
    names = [f"{process}_of_{processes}" for process in range(processes)]
    return [
        (
            keras.saving.load_model(output / f"{name}.keras"),
            json.loads((output / f"{name}.json").read_text()),
        )
        for name in names
    ]


def test_two_processes_equal_one_with_all_examples(tmp_path):
    pytest.importorskip("jax")
    pytest.importorskip("sklearn")
    first, second = run(2, tmp_path)
    ((single, losses),) = run(1, tmp_path)
    assert losses[1] < losses[0]
    for model, found in (first, second):
        np.testing.assert_allclose(found, losses, rtol=1e-5)
        for one, other in zip(model.weights, single.weights, strict=True):
            helpers.assert_close(one, other, 1e-5)
    for one, other in zip(first[0].weights, second[0].weights, strict=True):
        assert np.array_equal(helpers.to_numpy(one), helpers.to_numpy(other))
    layers = [
        layer
        for layer in single.layers
        if isinstance(layer, keras_renorm.BatchRenormalization)
    ]
    assert [layer.current_step() for layer in layers] == [10, 10]
    # Far from where they began.
    assert np.abs(helpers.statistics(layers[0])[1] - 1).min() > 0.1
