"""The data of `benchmarks/real/tiles.py`: what is seen, what held back."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from tests import helpers

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "real").exists(), reason="without the benchmarks"
)


@pytest.fixture
def tiles(monkeypatch):
    """The job; each pixel has its own number, and is a nucleus if it is odd."""
    monkeypatch.syspath_prepend(str(ROOT))
    module = importlib.import_module("benchmarks.real.tiles")
    image = np.arange(512 * 512, dtype="float32").reshape(512, 512, 1)
    monkeypatch.setattr(module, "micrograph", lambda: (image, image % 2))
    return module


def test_rates_are_chosen_on_what_is_not_judged(tiles):
    image, _, judged, _ = tiles.halves(is_tuning=False)
    tuned, _, chosen, _ = tiles.halves(is_tuning=True)
    assert image.shape == judged.shape == (512, 256, 1)
    assert tuned.shape == chosen.shape == (256, 256, 1)
    assert not set(judged.ravel()) & set(image.ravel())
    assert not set(tuned.ravel()) & set(chosen.ravel())
    assert set(tuned.ravel()) | set(chosen.ravel()) == set(image.ravel())


def test_a_patch_is_turned_with_its_mask(tiles, rng):
    image, mask, *_ = tiles.halves(is_tuning=False)
    x, y = tiles.patches(image, mask, 20, rng)
    assert x.shape == y.shape == (20, tiles.PATCH, tiles.PATCH, 1)
    np.testing.assert_array_equal(x % 2, y)
    assert len({tuple(np.sign(np.diff(each[:2, 0, 0]))) for each in x}) == 2


def test_each_tile_has_a_lamp(tiles, rng):
    image = np.ones((512, 256, 1), "float32")
    found = tiles.windows(tiles.under_lamps(image, rng), tiles.TILE)
    assert found.shape == (32, tiles.TILE, tiles.TILE, 1)
    assert np.all(found == found[:, :1, :1])
    brightness = found[:, 0, 0, 0]
    assert len(set(brightness)) == 32
    assert 0.5 <= brightness.min() < 0.8 < 1.25 < brightness.max() <= 2


def test_intersection_over_union(tiles):
    found = np.array([0.9, 0.8, 0.2, 0.1])
    assert tiles.iou(found, np.array([1, 0, 1, 0])) == pytest.approx(1 / 3)


def test_tiles_are_put_together(tiles, rng):
    class Model:
        def predict_on_batch(self, images):
            assert images.shape == (1, 112, 112, 1)
            return images * 2

    image, *_ = tiles.halves(is_tuning=False)
    found = tiles.predict_in_tiles(Model(), image)
    np.testing.assert_array_equal(found, image * 2)


def test_what_is_missing_is_named(tiles, monkeypatch):
    monkeypatch.undo()  # the image in its place
    tiles.micrograph.cache_clear()
    monkeypatch.setattr(tiles.importlib.util, "find_spec", lambda name: None)
    with helpers.raises(
        ImportError,
        "This needs `stardist`, for the image in its wheel: pip install "
        "--no-deps stardist",
    ):
        tiles.micrograph()
