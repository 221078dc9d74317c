"""What the package's files may import, and its documented examples."""

import ast
import doctest
import functools
import importlib
import pkgutil
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm

ROOT = Path(keras_renorm.__file__).parent
BACKENDS = {"tensorflow", "jax", "torch"}
MODULES = sorted(
    info.name
    for info in pkgutil.walk_packages([str(ROOT)], "keras_renorm.")
    if not info.ispkg
)


# Rows from the ground up: a module may import what is in its row or above it.
# A folder's row is that of what is in it and has no row of its own.
LAYOUT = (
    "_checks",
    "_backend.operations",
    "_backend.runtime",
    "_backend.derivatives",
    "_backend.tracing",
    "_backend.variables",
    "_backend",
    "schedules",
    "_step.moments",
    "_step.records",
    "_step.gating",
    "_step.gradient",
    "_step.correction",
    "_step.operators",
    "_step.pooling",
    "_step.plain",
    "_step.fused",
    "_step.aten",
    "_step.choice",
    "_step",
    "layers",
    "models._layers.calls",
    "models._layers.finding",
    "models._layers.graphs",
    "models._layers.configuration",
    "models._layers.state",
    "models._surgery.translation",
    "models.replacing",
    "models._surgery.in_place",
    "models._surgery.copying",
    "models._surgery.tf_functions",
    "models._surgery.tf_keras_layers",
    "models._surgery.from_tf_keras",
    "models._data.arrays",
    "models._data.batches",
    "models._data.feeding",
    "models._data.totals",
    "models._data.passes",
    "models",
    "diagnostics._report.drawing",
    "diagnostics._report.advice",
    "diagnostics._report.measurement",
    ("diagnostics._report.record", "diagnostics._report.scores"),
    "diagnostics._report.comparison",
    "diagnostics._report.conditions",
    "diagnostics._report.verdict",
    "diagnostics._report",
    "diagnostics._tiles.report",
    "diagnostics._tiles.grid",
    "diagnostics._tiles.calls",
    "diagnostics._tiles.network",
    "diagnostics._tiles",
    "_landscape",
    "callbacks._monitor",
    "callbacks",
)
ROWS = {
    name: at
    for at, row in enumerate(LAYOUT)
    for name in ((row,) if isinstance(row, str) else row)
}


def rank(module):
    """The row of what a module is in, the most particular first."""
    parts = module.removeprefix("keras_renorm.").split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in ROWS:
            return ROWS[name]
    raise AssertionError(f"{module} is in no row of `LAYOUT`")


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


def test_the_layout_names_what_there_is():
    for name in ROWS:
        path = ROOT.joinpath(*name.split("."))
        assert path.is_dir() or path.with_suffix(".py").exists(), name


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    for name in imports(module):
        if name.startswith("keras_renorm."):
            assert rank(name) <= rank(module), f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_a_reader_sees_a_file_or_function_at_once(module):
    path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
    assert len(path.read_text().splitlines()) <= 400
    for node in nodes(path):
        # A constructor names each argument three times.
        if isinstance(node, ast.FunctionDef) and node.name != "__init__":
            lines = node.end_lineno - node.lineno + 1
            written = len((ast.get_docstring(node) or "").splitlines())
            assert lines - written <= 60, node.name


@pytest.mark.parametrize("module", MODULES)
def test_one_folder_knows_the_backend(module):
    if module.startswith("keras_renorm._backend."):
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


def test_tab_completion_offers_public_names_only():
    assert dir(keras_renorm) == sorted([*keras_renorm.__all__, "__version__"])
