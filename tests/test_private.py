"""Private names of others that the package uses, and why."""

import ast
from pathlib import Path

import pytest

import keras_renorm

ROOT = Path(keras_renorm.__file__).parent
# File and name (`_flatten_layers` is Keras's and tf_keras's): why, and the test
# that fails when a release breaks it.
USED = {
    ("_step/choice.py", "_get_control_flow_context"): (
        "TensorFlow: whether XLA compiles the graph (and a class name in it)",
        "test_kernels.py::test_xla_is_recognized_wherever_it_comes_from",
    ),
    ("_backend/runtime.py", "_track_variables"): (
        "Keras: PyTorch learns of variables where a layer is built, only",
        "test_aten.py::test_torch_sees_the_variables_of_converted_layers",
    ),
    ("models/_surgery/copying.py", "_compile_config"): (
        "Keras: its public part has names in the place of functions",
        "test_convert.py"
        "::test_functions_that_no_file_could_name_are_the_copys_too",
    ),
    ("models/_surgery/in_place.py", "_track_variable"): (
        "Keras: a built layer takes no other variables by public means",
        "test_in_place.py::test_there_and_back_is_the_same_to_the_bit",
    ),
    ("models/_surgery/in_place.py", "_tracker"): (
        "the same",
        "test_in_place.py::test_there_and_back_is_the_same_to_the_bit",
    ),
    ("models/_surgery/in_place.py", "_untrack_variable"): (
        "the same",
        "test_in_place.py::test_there_and_back_is_the_same_to_the_bit",
    ),
    ("models/_surgery/tf_keras_layers.py", "_flatten_layers"): (
        "tf_keras: its graph; tf_keras no longer changes",
        "test_legacy.py::test_inference_is_the_same",
    ),
    ("models/_surgery/tf_keras_layers.py", "_callable_losses"): (
        "tf_keras: losses of `add_loss`; in `losses`, all are tensors",
        "test_legacy.py::test_a_loss_that_was_added_is_an_error",
    ),
    ("models/_surgery/from_tf_keras.py", "_nodes_by_depth"): (
        "the same",
        "test_legacy.py::test_inference_is_the_same",
    ),
    ("models/_layers/finding.py", "_flatten_layers"): (
        "Keras: layers inside custom layers",
        "test_callbacks.py::test_layers_inside_custom_layers_are_found",
    ),
}
# Those that are no attribute in the source: names in strings, and modules.
HIDDEN = {
    ("models/_layers/configuration.py", "_<argument> of any object"): (
        "a function that a configuration cannot hold",
        "test_convert.py"
        "::test_functions_that_no_file_could_name_are_the_copys_too",
    ),
    ("models/_layers/state.py", "_modules"): (
        "PyTorch: layers; the public way leaves out second names of one",
        "test_copies.py::test_what_is_set_later_is_handed_on",
    ),
    ("models/_layers/graphs.py", "names in `_BOOKKEEPING`"): (
        "Keras: what changes on a model without a new graph; one that is gone "
        "costs a trace",
        "test_landscape.py::test_training_between_calls_traces_nothing_anew",
    ),
    ("_backend/derivatives.py", "forwardprop_util"): (
        "TensorFlow: whether a derivative in forward mode is being taken",
        "test_derivatives.py::test_forward_mode",
    ),
    ("_backend/repetition.py", "kwargs, gen, recompute_fn"): (
        "in `tf.recompute_grad` and `torch.utils.checkpoint`: which call of "
        "`keras.remat` a second call of a layer belongs to",
        "test_recomputation.py::test_a_recomputed_step_is_the_same",
    ),
    ("_backend/derivatives.py", "_functorch"): (
        "PyTorch: whether a function of `torch.func` is at work",
        "test_aten.py::test_forward_mode_and_transforms",
    ),
    ("_backend/runtime.py", "train_step, optimizer"): (
        "Keras: whether who trains scales the loss, by the frames of a step",
        "test_gate_backends.py"
        "::test_the_scale_of_the_loss_is_seen_where_the_optimizer_scales",
    ),
    ("_backend/runtime.py", "is_op_determinism_enabled"): (
        "TensorFlow: whether operators must be deterministic",
        "test_kernels.py"
        "::test_a_deterministic_gpu_gets_no_operator_that_is_not",
    ),
    ("models/_surgery/from_tf_keras.py", "_keras_mask"): (
        "Keras and tf_keras: whether a tensor of a graph has a mask",
        "test_legacy.py::test_another_mask_is_an_error",
    ),
    ("diagnostics/_report/comparison.py", "_keras_mask"): (
        "Keras: which outputs of a model are padding",
        "test_discrepancy.py::test_padding_in_outputs_does_not_count",
    ),
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
    assert found == USED.keys()


@pytest.mark.parametrize(
    ("where", "test"),
    [(key, test) for key, (_, test) in {**USED, **HIDDEN}.items()],
    ids=str,
)
def test_a_test_fails_when_it_is_gone(where, test):
    assert (ROOT / where[0]).exists()
    file, name = test.split("::")
    source = (Path(__file__).parent / file).read_text()
    assert f"def {name}(" in source
