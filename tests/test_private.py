"""Private names of others that the package uses: CONTRIBUTING lists them."""

import ast
from pathlib import Path

import pytest

import keras_renorm

ROOT = Path(keras_renorm.__file__).parent
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
# By file: `_flatten_layers` is Keras's and tf_keras's.
USED = {
    ("kernels.py", "_get_control_flow_context"),
    ("models/copying.py", "_compile_config"),
    ("models/in_place.py", "_track_variable"),
    ("models/in_place.py", "_tracker"),
    ("models/in_place.py", "_untrack_variable"),
    ("models/tf_keras_layers.py", "_flatten_layers"),
    ("models/from_tf_keras.py", "_nodes_by_depth"),
    ("models/finding.py", "_flatten_layers"),
}


def private_names(path):
    """Attributes with an underscore that the file does not define."""
    tree = ast.parse(path.read_text())
    own = {
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            is_self = ast.unparse(node.value) in ("self", "cls")
            of_tuples = node.attr in ("_asdict", "_replace")
            is_public = node.attr.endswith("__") or of_tuples
            if not (is_self or is_public or node.attr in own):
                yield node.attr


def test_no_other_private_name_is_used():
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in ROOT.rglob("*.py")
        for name in private_names(path)
    }
    assert found == USED


@pytest.mark.skipif(not CONTRIBUTING.exists(), reason="outside a checkout")
def test_contributing_lists_them_with_a_test_that_exists():
    text = CONTRIBUTING.read_text()
    section = text.split("## Private names that are used")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `") or line.startswith("| names")
    ]
    listed = {
        (where.strip("`"), name)
        for names, _, where, *_ in rows
        for name in names.replace("`", "").split(", ")
    }
    assert listed >= USED
    for *_, test in rows:
        if test != "the same":
            file, name = test.strip("`").split("::")
            source = (Path(__file__).parent / file).read_text()
            assert f"def {name}(" in source
