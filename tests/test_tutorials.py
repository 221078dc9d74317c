"""The tutorials' switches that need a network, on mocked data.

What the tutorials claim they assert themselves; CI runs them.
"""

import runpy
from pathlib import Path

import numpy as np
import pytest

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
