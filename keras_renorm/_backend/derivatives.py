"""Gradients of our own, forward mode, and gradients of a function."""

import contextlib
import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from keras_renorm._backend.operations import Tensor
from keras_renorm._backend.runtime import jax, runs_on, tf, torch

functorch: Any = None
if runs_on("tensorflow"):
    try:
        # Private: see tests/test_private.py.
        from tensorflow.python.eager import forwardprop_util  # noqa: TID251
    except ImportError:
        forwardprop_util = None
elif runs_on("torch"):
    from torch.autograd import forward_ad

    with contextlib.suppress(ImportError):
        # Private: see tests/test_private.py.
        from torch._C import _functorch

        functorch = _functorch

    class _Differentiated(torch.autograd.Function):
        """A function that gives its gradient with its results."""

        @staticmethod
        def forward(ctx: Any, function: Any, *tensors: Tensor) -> Any:
            """Keeps the gradient, and what another one is taken of."""
            outputs, gradient = function(*tensors)
            if any(ctx.needs_input_grad):
                ctx.save_for_backward(*tensors)
                ctx.function, ctx.gradient = function, gradient
            # Others than the gradient may hold: what is returned holds this
            # node, and the node holds the gradient.
            return tuple(output.detach() for output in outputs)

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
            """The gradient that was kept, or one that has derivatives.

            Nothing in `forward` is recorded. So where a gradient is recorded,
            the function is computed again, of the same tensors.
            """
            # To ask for these is to ask whether they were written over.
            tensors = ctx.saved_tensors
            if not torch.is_grad_enabled():
                return None, *ctx.gradient(*upstream)
            _, gradient = ctx.function(*tensors)
            return None, *gradient(*upstream)

    # Its compiler would look into the function, and fail.
    _differentiated = torch.compiler.disable(_Differentiated.apply)


def carry_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a derivative in forward mode is being taken of any of these.

    Or one of `torch.func`. In a graph a `tf.autodiff.ForwardAccumulator` takes
    no notice of `tf.custom_gradient`, but of the operations inside; and eagerly
    it calls a gradient with ones. PyTorch needs a derivative of its own for
    each kind. There is no public way to ask.
    """
    known = [each for each in tensors if each is not None]
    if runs_on("torch"):
        return is_transformed() or any(
            forward_ad.unpack_dual(each).tangent is not None for each in known
        )
    if not runs_on("tensorflow") or forwardprop_util is None:
        return False
    return bool(forwardprop_util.pack_tangents(known).tangents)


def is_transformed() -> bool:
    """Whether a function of `torch.func` is at work."""
    return functorch is not None and bool(functorch.peek_interpreter_stack())


def custom_gradient(function: Any, *constants: Any) -> Any:
    """A function of tensors that has a gradient of its own.

    It is differentiated twice as its formulas are. On JAX and PyTorch it must
    refer to nothing that is differentiated, but take it as an argument; on
    PyTorch neither to what somebody writes over later, as variables are.

    Args:
        function: Of `constants` and tensors. It returns a tuple of tensors, and
            a function from their gradients to those of these tensors.
        *constants: What else it reads, structures. (In a `jax.checkpoint` a
            function must not refer to tensors.)
    """
    if runs_on("jax"):
        return _custom_gradient_of_jax(function, constants)

    def of_tensors(*tensors: Tensor) -> Any:
        return function(*constants, *tensors)

    if runs_on("torch"):
        return functools.partial(_differentiated, of_tensors)
    return _custom_gradient_of_tensorflow(of_tensors)


def _custom_gradient_of_jax(function: Any, constants: Any) -> Any:
    """The outputs, too, have this gradient where it is differentiated.

    Of what computes it JAX takes its own derivatives. (A compiler computes only
    once what is here twice.)
    """
    leaves, form = jax.tree.flatten(constants)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def of(outputs: Any) -> Any:
        @jax.custom_gradient
        def called(
            read: list[Tensor], *tensors: Tensor
        ) -> tuple[tuple[Tensor, ...], Any]:
            filled = list(leaves)
            for index, value in zip(at, read, strict=True):
                filled[index] = value
            plain, gradient = function(
                *jax.tree.unflatten(form, filled), *tensors
            )
            return (
                tuple(plain) if outputs is None else outputs(read, *tensors),
                lambda upstream: (
                    [jax.numpy.zeros_like(each) for each in read],
                    *gradient(*upstream),
                ),
            )

        return called

    return functools.partial(of(of(None)), [leaves[index] for index in at])


def _custom_gradient_of_tensorflow(function: Any) -> Any:
    """`tf.custom_gradient`, which here does not keep graphs alive.

    For each call in a graph TensorFlow registers the gradient for ever, and
    with it the tensors that it refers to, and with them the graph. Here it
    registers a reference, and the graph keeps the gradient.
    """

    @functools.wraps(function)
    def called(*tensors: Tensor) -> tuple[Tensor, ...]:
        if tf.executing_eagerly():
            return tuple(tf.custom_gradient(function)(*tensors))
        registered: list[Tensor | None] = []

        def referred(*tensors: Tensor) -> tuple[list[Tensor], Any]:
            outputs, gradient = function(*tensors)
            registered.extend(outputs)
            graph = outputs[0].graph
            graph.keras_renorm_gradients = (
                *getattr(graph, "keras_renorm_gradients", ()),
                gradient,
            )
            reference = weakref.ref(gradient)

            def found(*upstream: Tensor) -> Any:
                gradient = reference()
                if gradient is None:
                    raise LookupError(
                        "The gradient of a saved function must be saved with "
                        "it: its graph is gone. Save it with `tf.saved_model."
                        "SaveOptions(experimental_custom_gradients=True)`."
                    )
                return gradient(*upstream)

            return registered, found

        # In a branch, and in a gradient, some are of another graph. It, and a
        # derivative of the gradient, finds them only if they are made anew.
        graph = tf.compat.v1.get_default_graph()
        tensors = tuple(
            each if getattr(each, "graph", None) is graph else tf.identity(each)
            for each in tensors
        )
        outputs = tf.custom_gradient(referred)(*tensors)
        # Of these TensorFlow reads the number from now on.
        registered[:] = [None] * len(registered)
        return tuple(outputs)

    return called


def gradients_of(
    function: Any, tensors: Sequence[Tensor], upstream: Sequence[Tensor]
) -> list[Tensor | None]:
    """TensorFlow's gradients of a function of tensors, at these tensors."""
    with tf.GradientTape() as tape:
        tape.watch(tensors)
        outputs = function(*tensors)
    return tape.gradient(outputs, tensors, upstream)
