"""The loaders of the tutorials that need a network, on mocked data.

The tutorials themselves assert what they claim; CI runs them.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

TUTORIALS = Path(__file__).parent.parent / "tutorials"


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
def test_quickstart_loads_mnist():
    import tensorflow_datasets as tfds

    path = TUTORIALS / "01_quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    with tfds.testing.mock_data(num_examples=12):
        splits = quickstart.load("mnist")
    for images, labels in splits:
        assert images.shape == (12, 28, 28, 1)
        assert images.dtype == np.float32
        assert 0 <= images.min() <= images.max() <= 1
        assert labels.shape == (12,)
    x, y = splits[0]
    y = np.arange(12) % 10
    batches = quickstart.minibatches(x, y, 3, one_class=True, seed=0)
    for _, labels in batches.take(5):
        assert len(set(labels.numpy())) == 1
