"""What the package's files may import, and its documented examples."""

import ast
import doctest
import functools
import importlib
import itertools
import pkgutil
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm

ROOT = Path(keras_renorm.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
in_a_checkout = pytest.mark.skipif(
    not CONTRIBUTING.exists(), reason="outside a checkout"
)
BACKENDS = {"tensorflow", "jax", "torch"}
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages([str(ROOT)], "keras_renorm.")
    if not info.ispkg
)


def layout():
    """Rows of CONTRIBUTING's table: the modules and packages of each."""
    section = CONTRIBUTING.read_text().split("## Layout")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \| ", section, re.MULTILINE)
    return [
        [
            name.removesuffix(".py").rstrip("/").replace("/", ".")
            for name in re.findall(r"`([\w/]+(?:\.py|/))`", row)
        ]
        for row in rows
    ]


def rank(module):
    """The row of what a module is in, the most particular first."""
    rows = layout()
    parts = module.removeprefix("keras_renorm.").split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        found = [at for at, names in enumerate(rows) if name in names]
        if found:
            assert len(found) == 1, f"{name} is in two rows"
            return found[0]
    raise AssertionError(f"{module} is in no row of CONTRIBUTING's table")


@functools.cache
def nodes(path):
    return list(ast.walk(ast.parse(path.read_text())))


def imports(module):
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_are_modules():
    assert "keras_renorm.layers.batch_normalization" in MODULES


@in_a_checkout
def test_the_layout_names_what_there_is():
    for name in itertools.chain(*layout()):
        path = ROOT.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").exists(), name


@in_a_checkout
@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    for name in imports(module):
        if name.startswith("keras_renorm."):
            assert rank(name) <= rank(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_one_module_knows_the_backend(module):
    # And one below it, which only renames.
    if module in ("keras_renorm.backend", "keras_renorm.operations"):
        return
    for name in imports(module):
        assert name.split(".")[0] not in BACKENDS, f"{module} imports {name}"
        assert name != "keras.backend"
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    for node in nodes(path):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "keras.backend.backend", module


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
