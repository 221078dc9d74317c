"""What the package's files may import, and its documented examples."""

import ast
import doctest
import importlib
import pkgutil
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm

ROOT = Path(keras_renorm.__file__).parent
# A module may import from its own layer of the package and those before it.
ORDER = [
    {"arguments"},
    {"functional"},
    {"schedules"},
    {"gradients"},
    {"backend"},
    {"fused"},
    {"pooling"},
    {"kernels"},
    {"layers"},
    {"models", "diagnostics"},
    {"callbacks"},
]
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages([str(ROOT)], "keras_renorm.")
    if not info.ispkg
)


def rank(module):
    name = module.split(".")[1]
    (found,) = [at for at, names in enumerate(ORDER) if name in names]
    return found


def imports(module):
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_are_modules():
    assert "keras_renorm.layers.batch_normalization" in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    for name in imports(module):
        if name.startswith("keras_renorm."):
            assert rank(name) <= rank(module), f"{module} imports {name}"
        if name.split(".")[0] == "tensorflow":
            assert module == "keras_renorm.backend"


@pytest.mark.parametrize("module", MODULES)
def test_examples_run(module):
    names = {
        "np": np,
        "keras": keras,
        "ops": ops,
        **{name: getattr(keras_renorm, name) for name in keras_renorm.__all__},
        **vars(keras_renorm.schedules),
        **vars(keras_renorm.callbacks),
        **{
            name: getattr(keras_renorm.diagnostics, name)
            for name in keras_renorm.diagnostics.__all__
        },
    }
    result = doctest.testmod(
        importlib.import_module(module),
        extraglobs=names,
        optionflags=doctest.NORMALIZE_WHITESPACE,
    )
    assert result.failed == 0


def test_public_names_have_an_example():
    for public in (
        keras_renorm.BatchNormalization,
        keras_renorm.BatchRenormalization,
        keras_renorm.schedules.LinearRamp,
        keras_renorm.schedules.ioffe2017,
        keras_renorm.callbacks.RenormScheduler,
        keras_renorm.callbacks.RecalibrateStatistics,
        keras_renorm.callbacks.FreezeStatistics,
        keras_renorm.callbacks.RenormMonitor,
        keras_renorm.diagnostics.discrepancy,
        keras_renorm.convert,
        keras_renorm.revert,
        keras_renorm.fold,
        keras_renorm.freeze_statistics,
        keras_renorm.unfreeze_statistics,
        keras_renorm.recalibrate,
        keras_renorm.replacing,
        keras_renorm.get_statistics,
        keras_renorm.set_statistics,
        keras_renorm.diagnostics.loss_along_gradient,
        keras_renorm.diagnostics.gradient_predictiveness,
        keras_renorm.diagnostics.effective_smoothness,
        keras_renorm.diagnostics.internal_covariate_shift,
        keras_renorm.diagnostics.ActivationNoise,
    ):
        assert ">>>" in public.__doc__, public
