"""Settings that must stand before a backend starts."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# float64 references need a float64 backend.
os.environ.setdefault("JAX_ENABLE_X64", "1")
# Two devices, over which JAX can spread a batch.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import keras
import numpy as np
import pytest

if keras.backend.backend() == "tensorflow":
    # Devices for all tests: a strategy needs them before TensorFlow
    # starts, and nothing else notices.
    import tensorflow as tf

    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 4,
    )

if keras.backend.backend() == "torch":
    # It gives some warnings in C++, and those once a process, to whichever
    # test comes first.
    import torch

    torch.set_warn_always(True)

BACKENDS = ("tensorflow", "jax", "torch")
# Each case of these is about something else: a module, a document, an error.
WHOLE = {
    f"test_{name}.py"
    for name in ("documents", "errors", "private", "signatures", "structure")
}


def _mark_further_cases(items):
    """Of a test all cases but the first and the last are `slow`, `further`."""
    cases = {}
    for item in items:
        if hasattr(item, "callspec") and item.path.name not in WHOLE:
            cases.setdefault((item.parent, item.originalname), []).append(item)
    for of_one_test in cases.values():
        for item in of_one_test[1:-1]:
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.further)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    _mark_further_cases(items)
    if "exhaustive" not in config.option.markexpr:
        drawn = [item for item in items if "exhaustive" in item.keywords]
        items[:] = [item for item in items if item not in drawn]
        config.hook.pytest_deselected(items=drawn)
    for item in items:
        named = [each for each in BACKENDS if each in item.keywords]
        if named and keras.backend.backend() not in named:
            reason = f"for Keras's {' or '.join(named)} backend"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    # Every test ends with a collection of garbage (`clear_session`), and what
    # is imported is none: looking through it took most of the time of most
    # tests.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    keras.utils.set_random_seed(0)
    yield
    keras.utils.clear_session()
    # What survives a test (modules, caches) is no garbage either.
    gc.freeze()


@pytest.fixture
def rng():
    return np.random.default_rng(0)
