"""The tutorials' switches that need a network, on mocked data.

What the tutorials claim they assert themselves; CI runs them.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest
from keras import layers

from keras_renorm.diagnostics import ActivationNoise

TUTORIALS = Path(__file__).parent.parent / "tutorials"


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
def test_quickstart_trains_on_mnist(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    options = ["--data", "mnist", "--seeds", "1", "--steps", "15"]
    monkeypatch.setattr(
        "sys.argv", ["quickstart", *options, "--output", str(tmp_path)]
    )
    with tfds.testing.mock_data(num_examples=120):
        names = runpy.run_path(str(TUTORIALS / "01_quickstart.py"))
    for images, labels in (
        (names["x_train"], names["y_train"]),
        (names["x_val"], names["y_val"]),
    ):
        assert images.shape == (120, 28, 28, 1)
        assert 0 <= images.min() <= images.max() <= 1
        assert labels.shape == (120,)
    rows = names["one_class_batches"](np.random.default_rng(1))
    assert rows.shape == (15, names["BATCH_SIZE"])
    assert all(len(set(names["y_train"][batch])) == 1 for batch in rows)
    assert (tmp_path / "quickstart.png").stat().st_size > 0


def count(model, kind):
    return sum(isinstance(layer, kind) for layer in model.layers)


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
def test_optimization_trains_the_networks_of_the_papers(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    options = "--scale full --seeds 1 --blocks 1 --batch-size 4 --steps 1"
    monkeypatch.setattr(
        "sys.argv",
        [
            "optimization",
            *options.split(),
            *("--points", "1", "--output", str(tmp_path)),
        ],
    )
    with tfds.testing.mock_data(num_examples=20):
        names = runpy.run_path(str(TUTORIALS / "08_optimization.py"))
    assert names["x_train"].shape == (20, 32, 32, 3)
    trained = {run[:3] for run in names["histories"]}
    assert trained == {
        *(("VGG", kind, 0.1) for kind in names["KINDS"]),
        *(
            ("ResNet", kind, rate)
            for kind in ("standard", "BN")
            for rate in (0.0001, 0.003, 0.1)
        ),
    }
    assert (tmp_path / "optimization.png").stat().st_size > 0
    shares = 0.0, 0.49, 0.5, 0.74, 0.75, 1.0
    assert [names["decays"](share) for share in shares] == [0, 0, 1, 1, 2, 2]
    x, _ = names["augmented"](names["x_train"][:3], names["y_train"][:3])
    assert x.shape == (3, 32, 32, 3)

    # He et al. 2016, section 4.2: 6n + 2 layers, here n = 18.
    resnet = names["resnet"]("BN", 18, decay=5e-5)
    assert count(resnet, layers.Add) == 54
    assert count(resnet, layers.Conv2D) == 1 + 54 * 2
    assert count(resnet, layers.Dense) == 1
    assert count(resnet, layers.BatchNormalization) == 109
    assert [resnet.layers[-2].output.shape[-1], len(resnet.losses)] == [64, 109]
    weights = sum(np.prod(w.shape) for w in resnet.trainable_variables)
    assert 1_650_000 < weights < 1_750_000  # "1.7M"

    vgg = names["vgg"]("standard", names["FULL_VGG"])
    assert count(vgg, layers.Conv2D) == 13
    assert count(vgg, layers.BatchNormalization) == 0
    noisy = names["vgg"]("noisy BN", names["FULL_VGG"])
    assert count(noisy, ActivationNoise) == 13
