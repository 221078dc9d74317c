"""Graphs that layers share, and vectors that NumPy computes."""

import contextlib
import contextvars
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from keras import tree

from keras_renorm._backend.derivatives import is_transformed
from keras_renorm._backend.operations import Tensor
from keras_renorm._backend.runtime import (
    jax,
    must_be_deterministic,
    name,
    runs_as_one_graph,
    runs_on,
    tf,
    torch,
)


def traced_when_eager(function: Any) -> Any:
    """A function of tensors and constants, as a graph where called eagerly.

    In eager mode each operation on a vector costs its dispatch, and a step
    has some fifty of them. All callers share a graph (`_Graphs`), so the
    arguments must be all that the function reads. Under a distribution
    strategy, and on other backends, it is the function itself.
    """
    graphs = _Graphs(function)

    @functools.wraps(function)
    def called(*arguments: Any) -> Any:
        if not runs_as_one_graph():
            return function(*arguments)
        graph, tensors = graphs.of(arguments)
        return graph(*tensors)

    return called


def shared_call(function: Any, stays: bool = False) -> Any:
    """A function of tensors and constants, as one node where a graph is made.

    To add an operation to a graph takes Python as long as thousands of
    elements take to compute, and a network repeats the operations of a step in
    each layer. The node is a call of a graph that all layers share.
    TensorFlow's optimizer puts its operations in the place of the node, unless
    it `stays`: that makes the first step of a network sooner, since neither
    the operations nor their optimization is repeated, but each call takes some
    tens of microseconds, which a small tensor feels. Eagerly, under a
    distribution strategy, and on JAX, it is the function itself, on PyTorch
    what `by_numpy` makes.

    No gradient passes through the node, and to take one is an error. Its
    outputs have no known size: set it.
    """
    if runs_on("torch"):
        return by_numpy(function)
    graphs = _Graphs(function, {"_noinline": True} if stays else None)

    @functools.wraps(function)
    def called(*arguments: Any) -> Any:
        if not shares_nodes():
            return function(*arguments)
        graph, tensors = graphs.of(arguments)
        outputs = tf.raw_ops.PartitionedCall(
            args=tensors,
            Tout=[each.dtype for each in graph.outputs],
            f=_instance(graph),
            config_proto=_unoptimized(),
        )
        return _packed(graph, outputs)

    return called


_calls = itertools.count()


def _instance(graph: Any) -> Any:
    """A graph with kernels of its own, for one call.

    Calls of the same name and attributes share kernels, and some of these, such
    as oneDNN's for normalization, keep in themselves what they work on. Two
    layers at once, in branches of a network, would then write over each other's
    memory.
    """
    graph.add_to_graph(tf.compat.v1.get_default_graph())
    instance = tf.compat.v1.NameAttrList(name=graph.name)
    instance.attr["_call"].i = next(_calls)
    return instance


@functools.cache
def _unoptimized() -> bytes:
    """That a call's graph is not optimized, which each call would do anew."""
    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    return config.SerializeToString()


def by_numpy(function: Any) -> Any:
    """A function of moments and more, which NumPy computes where it is faster.

    That is on PyTorch, on a CPU, where nothing is recorded: an operation on a
    vector takes half of the time. Arguments and results are tensors of one
    device, numbers and `None`, in tuples and lists; floats have the type of the
    moments. `operations.ops` take arrays, too.
    """
    if not runs_on("torch"):
        return function

    @functools.wraps(function)
    def called(moments: Any, *arguments: Any) -> Any:
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or is_transformed()
            or moments.variance.device.type != "cpu"
        ):
            return function(moments, *arguments)
        with np.errstate(all="ignore"):
            results = function(
                *mapped(_array_of, torch.Tensor, (moments, *arguments))
            )
        dtype = moments.variance.dtype

        def tensor_of(array: Any) -> Any:
            tensor = torch.from_numpy(np.asarray(array))
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return mapped(tensor_of, (np.ndarray, np.generic), results)

    return called


def _array_of(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()


def mapped(function: Callable[[Any], Any], kind: Any, value: Any) -> Any:
    """A structure of tuples and lists, with results for leaves of a kind.

    (Those of Keras and PyTorch take ten times as long.)
    """
    if isinstance(value, kind):
        return function(value)
    if not isinstance(value, tuple | list):
        return value
    values = [mapped(function, kind, each) for each in value]
    return type(value)(*values) if hasattr(value, "_fields") else values


def set_shape(value: Tensor | None, like: Tensor) -> None:
    """Tells a graph that a value has the shape of another, as far as known."""
    if shares_nodes() and value is not None:
        value.set_shape(like.shape)


def shares_nodes() -> bool:
    """Whether `shared_call` makes a node here and now.

    Where a graph is made that may hold calls of others, and is not itself one
    that is shared: there nothing is made more than once.
    """
    return (
        runs_on("tensorflow")
        and tf.inside_function()
        and not tf.distribute.has_strategy()
        and not _is_sharing.get()
    )


_is_sharing = contextvars.ContextVar("is_sharing", default=False)


@contextlib.contextmanager
def _sharing() -> Iterator[None]:
    token = _is_sharing.set(True)
    try:
        yield
    finally:
        _is_sharing.reset(token)


class _Graphs:
    """Graphs of a function, one for each kind of arguments.

    They are for any sizes: a network has tens of them, and to make a graph
    takes as long as hundreds of calls. (Not by `tf.function` itself, which
    warns where graphs are made one after the other.)
    """

    def __init__(self, function: Any, attributes: Any = None) -> None:
        self._function = function
        self._attributes = attributes
        self._graphs: dict[Any, Any] = {}

    def of(self, arguments: Sequence[Any]) -> tuple[Any, list[Tensor]]:
        """The graph for these arguments, and those of them that it takes."""
        leaves = tf.nest.flatten(arguments)
        kind = (
            must_be_deterministic(),
            *(
                (leaf.dtype, _sizes(leaf)) if tf.is_tensor(leaf) else leaf
                for leaf in leaves
            ),
        )
        if kind not in self._graphs:
            self._graphs[kind] = self._trace(arguments, leaves)
        return self._graphs[kind], list(filter(tf.is_tensor, leaves))

    def _trace(self, arguments: Sequence[Any], leaves: Sequence[Any]) -> Any:
        function = self._function  # or the graph would keep the tensors
        at = [i for i, leaf in enumerate(leaves) if tf.is_tensor(leaf)]
        specs = [
            tf.TensorSpec(_sizes(leaves[index]), leaves[index].dtype)
            for index in at
        ]
        constants = [None if tf.is_tensor(leaf) else leaf for leaf in leaves]
        form = tf.nest.pack_sequence_as(arguments, [None] * len(leaves))

        def on_tensors(*values: Tensor) -> Any:
            filled = list(constants)
            for index, value in zip(at, values, strict=True):
                filled[index] = value
            return function(*tf.nest.pack_sequence_as(form, filled))

        # Neither the graph in the making nor the device of whoever comes
        # first must be those of all.
        with tf.init_scope(), tf.device(None), _sharing():
            return tf.function(
                on_tensors,
                autograph=False,
                experimental_attributes=self._attributes,
            ).get_concrete_function(*specs)


def _packed(graph: Any, outputs: Iterable[Tensor]) -> Any:
    """Outputs of a graph in the structure that its function returned."""
    values = iter(outputs)
    return tf.nest.pack_sequence_as(
        graph.structured_outputs,
        [
            next(values) if tf.is_tensor(leaf) else leaf
            for leaf in tf.nest.flatten(graph.structured_outputs)
        ],
    )


def _sizes(tensor: Tensor) -> tuple[int | None, ...] | None:
    """What a graph knows of a shape: its rank, and which axes are 1."""
    if tensor.shape.rank is None:
        return None
    return tuple(1 if size == 1 else None for size in tensor.shape)


def compiled(function: Any, is_eager: bool = False) -> Any:
    """A function of tensors as a graph, where the backend has graphs.

    No gradient is taken of what it returns; PyTorch then keeps no history.
    """
    if runs_on("torch"):
        return torch.no_grad()(function)
    if runs_on("jax") or is_eager:
        return function
    # Partials have no code of their own: TensorFlow counts traces by code, and
    # would warn when many models, or one model many times, are run.
    graph = tf.function(
        functools.partial(_with_marks, function),
        autograph=False,
        reduce_retracing=True,
    )

    def called(*arguments: Any) -> Any:
        outputs, marks = graph(*arguments)
        for leaf, mark in zip(tf.nest.flatten(outputs), marks, strict=True):
            for attribute, value in mark.items():
                setattr(leaf, attribute, value)
        return outputs

    return called


def _with_marks(function: Any, *arguments: Any) -> Any:
    """Outputs of a function, and what Keras notes on each of them.

    A mask, and the logits of probabilities, which losses read. Outputs of a
    graph come without.
    """
    outputs = function(*arguments)
    return outputs, [
        {
            attribute: value
            for attribute, value in getattr(leaf, "__dict__", {}).items()
            if attribute.startswith("_keras_") and tf.is_tensor(value)
        }
        for leaf in tf.nest.flatten(outputs)
    ]


def forget_traces(method: Any) -> None:
    """Lets a method of an object be traced anew.

    JAX finds traces by the function, and a bound method equals those before
    it: while anything holds the one that was traced (a traceback does), another
    gets its trace.
    """
    if runs_on("jax"):
        import jax

        jax.jit(method).clear_cache()


def value_and_gradients(function: Any) -> tuple[Any, Any]:
    """`function(weights, *arguments)`, and it with gradients, as graphs.

    (On PyTorch as functions.) `weights` is a list of tensors; the function
    returns a number and keeps no state. The second graph returns
    `(value, gradients)`, the gradients a list of dense tensors, zero for a
    weight that the value does not depend on.
    """
    if runs_on("tensorflow"):

        def differentiated(
            weights: list[Tensor], *arguments: Any
        ) -> tuple[Tensor, list[Tensor]]:
            with tf.GradientTape() as tape:
                tape.watch(weights)
                value = function(weights, *arguments)
            gradients = tape.gradient(
                value, weights, unconnected_gradients="zero"
            )
            # That of a table that is looked up in is sparse.
            return value, [tf.convert_to_tensor(each) for each in gradients]

        return compiled(function), compiled(differentiated)
    if runs_on("jax"):
        return jax.jit(function), jax.jit(jax.value_and_grad(function))
    if runs_on("torch"):
        return _by_torch(function)
    raise RuntimeError(
        "The backend of Keras must be TensorFlow, JAX or PyTorch. "
        f"Received: {name()}."
    )


def _by_torch(function: Any) -> tuple[Any, Any]:
    """`value_and_gradients` on PyTorch, which has no graphs of functions."""

    def same_dropout(*arguments: Any) -> Any:
        # Without a seed, Keras's dropout draws from PyTorch's generators, which
        # are then what they were.
        devices = {arguments[0][0].device} - {torch.device("cpu")}
        with torch.random.fork_rng(devices):
            return function(*arguments)

    def evaluated(weights: list[Tensor], *arguments: Any) -> Tensor:
        with torch.no_grad():
            return same_dropout(weights, *arguments)

    def recordable(leaf: Any) -> Any:
        made_unrecorded = leaf is not None and leaf.is_inference()
        return leaf.clone() if made_unrecorded else leaf

    def differentiated(*given: Any) -> tuple[Tensor, list[Tensor]]:
        # In a `torch.inference_mode`, too, and of what was made in one.
        with torch.inference_mode(False), torch.enable_grad():
            weights, *arguments = tree.map_structure(recordable, given)
            # The same numbers, at which no other history begins or ends.
            weights = [weight.detach().requires_grad_() for weight in weights]
            value = same_dropout(weights, *arguments)
            if not value.requires_grad:  # it depends on none
                return value, [torch.zeros_like(weight) for weight in weights]
            gradients = torch.autograd.grad(
                value, weights, allow_unused=True, materialize_grads=True
            )
        return value.detach(), list(gradients)

    return evaluated, differentiated
