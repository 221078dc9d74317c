"""Whether a layer is called again in the same step, and by whom."""

import inspect
from typing import Any

import keras

from keras_renorm._backend.operations import Tensor
from keras_renorm._backend.runtime import jax, runs_on, tf, torch

if runs_on("tensorflow"):
    _REMAT_FILE = inspect.unwrap(tf.recompute_grad).__code__.co_filename
elif runs_on("jax"):
    _REMAT_FILE = inspect.unwrap(jax.checkpoint).__code__.co_filename
    _STATELESS_CALL = inspect.unwrap(keras.layers.Layer.stateless_call).__code__
elif runs_on("torch"):
    from torch.utils import checkpoint

    _REMAT_FILE = checkpoint.__file__


# Of layers that call another once for each step of a sequence.
_SEQUENCE_FILES = frozenset(
    map(inspect.getfile, (keras.layers.RNN, keras.layers.TimeDistributed))
)


def remat_calls(inputs: Tensor) -> tuple[list[Any], Any]:
    """The calls of `keras.remat` that this runs in, as keys.

    Those whose first pass this is, from inside out; and the first one met whose
    second pass it is, or `None`. `inputs` are those of the layer that asks. A
    key is an object that both passes of one call have, and no other: its
    dictionary of arguments by name. There is no public way to ask, so it is
    read off the stack.

    Raises:
        NotImplementedError: Where a second pass cannot be known: on JAX, on
            PyTorch with `use_reentrant=True`, and in a `tf.function` that
            `keras.remat` calls, whose graph is computed twice.
    """
    first: list[Any] = []
    if runs_on("torch") and torch.compiler.is_compiling():
        return first, None  # it has no stack, and traces both passes itself
    frame = inspect.currentframe()
    while frame is not None:
        if runs_on("jax") and frame.f_code is _STATELESS_CALL:
            break  # state is an output
        if frame.f_code.co_filename == _REMAT_FILE:
            key, is_second = _remat_call(frame)
            if is_second:
                return first, key
            if key is not None:
                first.append(key)
                _check_no_function(frame, inputs)
        frame = frame.f_back
    return first, None


def is_called_step_by_step() -> bool:
    """Whether a recurrent layer, or `TimeDistributed`, calls what calls this.

    There is no public way to ask, so it is read off the stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_filename in _SEQUENCE_FILES:
            return True
        frame = frame.f_back
    return False


def _remat_call(frame: Any) -> tuple[Any, bool]:
    """The call of `keras.remat` whose function a frame is of, if it is one.

    And whether it is in its second pass.
    """
    names = frame.f_locals
    if runs_on("tensorflow"):
        first = _made_in(inspect.unwrap(tf.recompute_grad).__code__)
        if frame.f_code in first:
            return names["kwargs"], False
        if any(frame.f_code in _made_in(each) for each in first):
            return names["kwargs"], True
    elif runs_on("torch"):
        if frame.f_code.co_name == "recompute_fn":
            return names["kwargs"], True
        if "gen" in names:
            return names["gen"].gi_frame.f_locals["kwargs"], False
        if names.get("use_reentrant"):
            raise NotImplementedError(
                "`use_reentrant` must be False where a layer moves its "
                "statistics: its second call would not be known. Received: "
                "use_reentrant=True."
            )
    else:
        raise NotImplementedError(
            "A layer that moves its statistics must not be called in "
            "`keras.remat` on Keras's JAX backend, where nothing but outputs "
            "can leave it. Call the layer between two such functions, make the "
            "state an output by `stateless_call`, or freeze its statistics."
        )
    return None, False


def _check_no_function(frame: Any, inputs: Tensor) -> None:
    """Raises in a `tf.function` that the function of a frame calls."""
    graph = getattr(inputs, "graph", None)
    if graph is None:
        return
    around = [
        getattr(each, "graph", None)
        for each in tf.nest.flatten(frame.f_locals["args"])
        if tf.is_tensor(each)
    ]
    # A loop's graph is of another class; it is made anew in the second pass.
    if any(each is None or type(each) is type(graph) for each in around) and (
        graph not in around
    ):
        raise NotImplementedError(
            "A layer that moves its statistics must not be in a `tf.function` "
            "that `keras.remat` calls: both passes would move them. Make one "
            "of what is around `keras.remat`."
        )


def _made_in(code: Any) -> list[Any]:
    """The code of the functions that a function makes."""
    return [each for each in code.co_consts if isinstance(each, type(code))]
