"""Two processes that train together, on one machine."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tests import helpers

pytestmark = [pytest.mark.slow, pytest.mark.tensorflow]
ROOT = Path(__file__).parents[1]


def run_workers(*arguments):
    """Runs two workers to their end; what each printed."""
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in (first, second)]
    workers = []
    for index in range(2):
        config = {
            "cluster": {"worker": [f"127.0.0.1:{port}" for port in ports]},
            "task": {"type": "worker", "index": index},
        }
        workers.append(
            subprocess.Popen(
                [sys.executable, *arguments],
                env={**os.environ, "TF_CONFIG": json.dumps(config)},
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        printed = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, printed, strict=True):
        assert worker.returncode == 0, output[-3000:]
    return printed


def test_two_workers_equal_one_device_with_all_examples(tmp_path, rng):
    from tests import one_worker

    x = helpers.inputs_of(rng, (9, 4), dtype="float64")
    x *= np.linspace(0.5, 2, len(x)).reshape(-1, 1)
    upstream = rng.normal(size=x.shape)
    parts = {
        f"{name}_{task}": part
        for name, whole in (("x", x), ("dy", upstream))
        for task, part in enumerate(np.split(whole, [6]))
    }
    np.savez(tmp_path / "data.npz", **parts)
    run_workers("-m", "tests.one_worker", str(tmp_path))
    workers = [np.load(tmp_path / f"worker_{task}.npz") for task in (0, 1)]

    def joined(key):
        return np.concatenate([worker[key] for worker in workers])

    for name in ("bn", "renorm"):
        single = one_worker.make(name, x.shape[-1])
        single(x, training=True)
        outputs, d_x, _ = helpers.gradients(single, x, upstream)
        helpers.assert_close(joined(f"{name}_outputs"), outputs, 1e-12)
        helpers.assert_close(joined(f"{name}_d_x"), d_x, 1e-12)
        helpers.assert_close(joined(f"{name}_inferred"), single(x), 1e-12)
        for worker in workers:
            for key, value in zip(
                ("mean", "variance"), helpers.statistics(single), strict=True
            ):
                helpers.assert_close(worker[f"{name}_{key}"], value, 1e-12)

    # Not synchronized: both read the average of the two.
    singles = []
    for part in np.split(x, [6]):
        singles.append(one_worker.make("apart", x.shape[-1]))
        for _ in range(2):
            singles[-1](part, training=True)
    mean, variance = np.mean(
        [helpers.statistics(single) for single in singles], axis=0
    )
    for worker in workers:
        helpers.assert_close(worker["apart_mean"], mean, 1e-12)
        helpers.assert_close(worker["apart_variance"], variance, 1e-12)
    singles[0].moving_mean.assign(mean)
    singles[0].moving_variance.assign(variance)
    helpers.assert_close(joined("apart_inferred"), singles[0](x), 1e-12)


def test_the_tutorial_trains_and_saves_one_model(tmp_path):
    printed = run_workers(
        str(ROOT / "tutorials" / "03_multi_worker.py"),
        *("--steps", "20", "--output", str(tmp_path)),
    )
    assert all("of 2 has started" in output for output in printed)
    models = [
        keras.saving.load_model(tmp_path / f"worker_{task}.keras")
        for task in (0, 1)
    ]
    for one, other in zip(*(model.weights for model in models), strict=True):
        assert np.array_equal(helpers.to_numpy(one), helpers.to_numpy(other))
    assert models[0].layers[4].current_step() == 20


def test_layers_train_beside_a_parameter_server():
    done = subprocess.run(
        [sys.executable, "-m", "tests.one_cluster"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("trained\n")
