"""What Keras's backends do differently; only this module asks which it is.

Graphs of functions and their gradients, what variables hold, replicas; and what
a backend can do at all, as questions. Kernels for TensorFlow take `tf` from
here; it is `None` where the backend is another.
"""

import contextlib
import contextvars
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import Variable, tree

from keras_renorm.operations import Tensor, ops


def name() -> str:
    """The name of Keras's backend."""
    return str(keras.backend.backend())


def _is(backend: str) -> bool:
    return name() == backend


tf: Any = None
torch: Any = None
if _is("tensorflow"):
    import tensorflow

    tf = tensorflow
    try:
        # Private: see tests/test_private.py.
        from tensorflow.python.eager import forwardprop_util  # noqa: TID251
    except ImportError:
        forwardprop_util = None
    _REMAT_FILE = inspect.unwrap(tf.recompute_grad).__code__.co_filename
    try:
        # Private: see tests/test_private.py.
        from tensorflow.python.framework.config import (  # noqa: TID251
            is_op_determinism_enabled,
        )
    except ImportError:
        is_op_determinism_enabled = None
elif _is("jax"):
    import jax
    from jax.experimental import io_callback

    _REMAT_FILE = inspect.unwrap(jax.checkpoint).__code__.co_filename
elif _is("torch"):
    import torch as torch_module
    from torch import distributed
    from torch.autograd import forward_ad
    from torch.utils import checkpoint

    torch = torch_module
    functorch: Any = None
    with contextlib.suppress(ImportError):
        # Private: see tests/test_private.py.
        from torch._C import _functorch

        functorch = _functorch
    _REMAT_FILE = checkpoint.__file__

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
            if not torch.is_grad_enabled():
                return None, *ctx.gradient(*upstream)
            _, gradient = ctx.function(*ctx.saved_tensors)
            return None, *gradient(*upstream)

    # Its compiler would look into the function, and fail.
    _differentiated = torch.compiler.disable(_Differentiated.apply)


# Of layers that call another once for each step of a sequence.
_SEQUENCE_FILES = frozenset(
    map(inspect.getfile, (keras.layers.RNN, keras.layers.TimeDistributed))
)


def has_fused_operators() -> bool:
    """Whether there are TensorFlow's."""
    return _is("tensorflow")


def has_aten(inputs: Tensor) -> bool:
    """Whether PyTorch's operators take these inputs, and are the fast way.

    On a CPU. A compiler joins plain operations itself.
    """
    return (
        _is("torch")
        and inputs.device.type == "cpu"
        and inputs.is_floating_point()
        and inputs.numel() > 0
        and not torch.compiler.is_compiling()
    )


def records_operations() -> bool:
    """Whether PyTorch records what is computed, to take its gradient."""
    return _is("torch") and torch.is_grad_enabled()


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
    if _is("torch") and torch.compiler.is_compiling():
        return first, None  # it has no stack, and traces both passes itself
    frame = inspect.currentframe()
    while frame is not None:
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
    if _is("tensorflow"):
        first = _made_in(inspect.unwrap(tf.recompute_grad).__code__)
        if frame.f_code in first:
            return names["kwargs"], False
        if any(frame.f_code in _made_in(each) for each in first):
            return names["kwargs"], True
    elif _is("torch"):
        if frame.f_code.co_name == "recompute_fn":
            return names["kwargs"], True
        if "gen" in names:
            return names["gen"].gi_frame.f_locals["kwargs"], False
        if "use_reentrant" in names:
            raise NotImplementedError(
                "`use_reentrant` must be False where a layer moves its "
                "statistics: its second call would not be known. Received: "
                "use_reentrant=True."
            )
    else:
        raise NotImplementedError(
            "A layer that moves its statistics must not be called in "
            "`keras.remat` on Keras's JAX backend, where nothing but outputs "
            "can leave it. Call the layer between two such functions, or "
            "freeze its statistics."
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


def is_traced(tensor: Tensor) -> bool:
    """Whether a graph is being made, in which numbers of Python are fixed."""
    if _is("tensorflow"):
        return tf.is_symbolic_tensor(tensor)
    return _is("jax") and isinstance(tensor, jax.core.Tracer)


@functools.lru_cache(256)
def constant(value: float, dtype: str) -> Any:
    """A number that layers which share a graph may each have another of.

    A tensor on TensorFlow, and the same one each time: to make one takes time.
    """
    if not _is("tensorflow"):
        return value
    with tf.init_scope(), tf.device(None):
        return tf.constant(value, dtype)


def counter_dtype(dtype: str) -> str:
    """The type of a counter that means of weights do not cut, at least `dtype`.

    A float32 counts to 2**24; float64 is not on each device of the others.
    """
    return "float64" if _is("tensorflow") else dtype


def lets_keras_synchronize() -> bool:
    """Whether Keras's own layer takes `synchronized=True`."""
    return _is("tensorflow")


def lets_callbacks_reach_batches() -> bool:
    """Whether what a callback assigns within an epoch has an effect.

    During an epoch Keras's JAX trainer holds the weights itself.
    """
    return not _is("jax")


def replicas() -> Any:
    """The context of the replica that this runs in, `None` if it is alone.

    It is a strategy's of TensorFlow. `None`, too, outside the replicas: where
    a strategy builds or saves a model.
    """
    if not _is("tensorflow"):
        return None
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    return context


def check_one_process() -> None:
    """Raises where PyTorch trains in several, which do not share statistics."""
    if not (
        _is("torch")
        and distributed.is_available()
        and distributed.is_initialized()
    ):
        return
    count = distributed.get_world_size()
    if count > 1:
        raise RuntimeError(
            "`synchronized` must be False where several processes of PyTorch "
            "train: each would normalize its own examples. Received: "
            f"synchronized=True, {count} processes."
        )


def runs_as_one_graph() -> bool:
    """Whether `traced_when_eager` makes a graph here and now."""
    return (
        _is("tensorflow")
        and tf.executing_eagerly()
        and not tf.distribute.has_strategy()
        and not tf.config.functions_run_eagerly()
    )


def must_be_deterministic() -> bool:
    """Whether what differs from run to run on a GPU may run on one.

    TensorFlow has no public way to ask for the first half.
    """
    return (
        is_op_determinism_enabled is not None
        and is_op_determinism_enabled()
        and has_gpu()
    )


def has_gpu() -> bool:
    """Whether TensorFlow has a GPU, where it places what it can."""
    return bool(tf.config.list_physical_devices("GPU"))


def drops_what_is_unused() -> bool:
    """Whether what is made here is computed only if it is asked for."""
    return _is("tensorflow") and not tf.executing_eagerly()


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
    if _is("torch"):
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
            f=graph,
            config_proto=_unoptimized(),
        )
        return _packed(graph, outputs)

    return called


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
    if not _is("torch"):
        return function

    @functools.wraps(function)
    def called(moments: Any, *arguments: Any) -> Any:
        if (
            torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or _is_transformed()
            or moments.variance.device.type != "cpu"
        ):
            return function(moments, *arguments)
        with np.errstate(all="ignore"):
            results = function(
                *_mapped(_array_of, torch.Tensor, (moments, *arguments))
            )
        dtype = moments.variance.dtype

        def tensor_of(array: Any) -> Any:
            tensor = torch.from_numpy(np.asarray(array))
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return _mapped(tensor_of, (np.ndarray, np.generic), results)

    return called


def _array_of(tensor: Any) -> np.ndarray:
    return tensor.detach().numpy()


def _mapped(function: Callable[[Any], Any], kind: Any, value: Any) -> Any:
    """A structure of tuples and lists, with results for leaves of a kind.

    (Those of Keras and PyTorch take ten times as long.)
    """
    if isinstance(value, kind):
        return function(value)
    if not isinstance(value, tuple | list):
        return value
    values = [_mapped(function, kind, each) for each in value]
    return type(value)(*values) if hasattr(value, "_fields") else values


def carry_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a derivative in forward mode is being taken of any of these.

    Or one of `torch.func`. In a graph a `tf.autodiff.ForwardAccumulator` takes
    no notice of `tf.custom_gradient`, but of the operations inside; and eagerly
    it calls a gradient with ones. PyTorch needs a derivative of its own for
    each kind. There is no public way to ask.
    """
    known = [each for each in tensors if each is not None]
    if _is("torch"):
        return _is_transformed() or any(
            forward_ad.unpack_dual(each).tangent is not None for each in known
        )
    if not _is("tensorflow") or forwardprop_util is None:
        return False
    return bool(forwardprop_util.pack_tangents(known).tangents)


def _is_transformed() -> bool:
    """Whether a function of `torch.func` is at work."""
    return functorch is not None and bool(functorch.peek_interpreter_stack())


def as_tensor(inputs: Any) -> Tensor:
    """Inputs, maybe a variable, as a tensor of the graph in the making."""
    if not _is("tensorflow"):
        return ops.convert_to_tensor(inputs)
    inputs = tf.convert_to_tensor(inputs)
    if tf.inside_function() and not tf.is_symbolic_tensor(inputs):
        return tf.identity(inputs)
    return inputs


def custom_gradient(function: Any) -> Any:
    """A function of tensors that has a gradient of its own.

    It is differentiated twice as its formulas are. On JAX and PyTorch it must
    refer to nothing that is differentiated, but take it as an argument; on
    PyTorch neither to what somebody writes over later, as variables are.

    Args:
        function: Of tensors. It returns a tuple of tensors, and a function from
            their gradients to those of its arguments.
    """
    if _is("torch"):
        return functools.partial(_differentiated, function)
    if _is("jax"):
        return _custom_gradient_of_jax(function)
    return _custom_gradient_of_tensorflow(function)


def _custom_gradient_of_jax(function: Any) -> Any:
    """The outputs, too, have this gradient where it is differentiated.

    Of what computes it JAX takes its own derivatives. (A compiler computes only
    once what is here twice.)
    """

    def of(outputs: Any) -> Any:
        @jax.custom_gradient
        def called(*tensors: Tensor) -> tuple[tuple[Tensor, ...], Any]:
            plain, gradient = function(*tensors)
            return (
                tuple(plain) if outputs is None else outputs(*tensors),
                lambda upstream: tuple(gradient(*upstream)),
            )

        return called

    return of(of(None))


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
        _is("tensorflow")
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
    if _is("torch"):
        return torch.no_grad()(function)
    if _is("jax") or is_eager:
        return function
    return tf.function(function, autograph=False, reduce_retracing=True)


def forget_traces(method: Any) -> None:
    """Lets a method of an object be traced anew.

    JAX finds traces by the function, and a bound method equals those before
    it: while anything holds the one that was traced (a traceback does), another
    gets its trace.
    """
    if _is("jax"):
        import jax

        jax.jit(method).clear_cache()


def report(
    receive: Callable[..., None], tensors: Sequence[Tensor], outputs: Tensor
) -> Tensor:
    """`outputs`, after `receive(*arrays)` got the values of tensors.

    From any place in a graph: a tensor inside a loop or a conditional cannot
    leave it, but its values can. `receive` is called once for each iteration of
    a loop, and not at all where nothing uses `outputs`: Keras runs the first
    step of a loop once more, to see the shapes that it makes.
    """
    if _is("tensorflow"):
        rank = len(outputs.shape)

        def received(*arrays: np.ndarray) -> np.ndarray:
            receive(*arrays)
            return np.zeros(rank, "int32")

        # All of the outputs, from a place that only the call tells: TensorFlow
        # drops what is only waited for, and what it can see to change nothing.
        begin = tf.numpy_function(
            received, list(tensors), tf.int32, stateful=False
        )
        begin = tf.ensure_shape(begin, [rank])
        told = tf.slice(outputs, begin, tf.shape(outputs))
        told.set_shape(outputs.shape)
        return told
    if _is("jax") and any(
        isinstance(each, jax.core.Tracer) for each in tensors
    ):
        io_callback(receive, None, *tensors)
    else:
        receive(*map(to_numpy, tensors))
    return outputs


def wait() -> None:
    """Waits until each `receive` of `report` has been called."""
    if _is("jax"):
        jax.effects_barrier()


def predict_function(model: Any, receive: Callable[[Any], None]) -> Any:
    """What `model.predict` runs in the place of a step: it only reads.

    `receive` gets each batch, on the host, whole where replicas share it. On
    JAX the model has its variables meanwhile, which Keras takes from it.
    """

    def by_tensorflow(batches: Sequence[Any]) -> Tensor:
        whole = functools.partial(_whole, strategy=model.distribute_strategy)
        return by_torch(tree.map_structure(whole, batches))

    def by_torch(batches: Sequence[Any]) -> Tensor:
        for batch in batches:
            receive(batch)
        return ops.zeros((1,))

    def by_jax(state: Any, iterator: Any) -> tuple[Tensor, Any]:
        for variables, values in zip(
            (model.trainable_variables, model.non_trainable_variables),
            state,
            strict=True,
        ):
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
        for batch in itertools.islice(iterator, model.steps_per_execution):
            receive(batch)
        return ops.zeros((1,)), state

    return {
        "tensorflow": by_tensorflow,
        "jax": by_jax,
        "torch": by_torch,
    }[name()]


def _whole(leaf: Any, strategy: Any) -> Any:
    """A part of a batch of Keras's loop, as a model takes it."""
    if isinstance(leaf, tf.experimental.Optional):
        return None
    if isinstance(leaf, tf.distribute.DistributedValues):
        return tf.concat(strategy.experimental_local_results(leaf), axis=0)
    return leaf


def step_arguments(model: Any, name: str, batch: Any) -> tuple[Any, ...]:
    """Arguments of a `train_step`, `test_step` or `predict_step`."""
    if not _is("jax"):
        return (batch,)
    state = [model.trainable_variables, model.non_trainable_variables]
    if name == "train_step":
        optimizer = getattr(model, "optimizer", None)  # if it is compiled
        state.append(getattr(optimizer, "variables", []))
    if name != "predict_step":
        state.append(model.metrics_variables)
    return [[each.value for each in group] for group in state], batch


def with_size(
    values: Tensor,
    axis: int,
    size: int,
    check: Callable[[Any], None] | None = None,
) -> Tensor:
    """`values`, the size of an axis known while a graph is built.

    Values that turn out to have another size are an error: that of
    `check(size of the axis)`, which is called where the size was not known.
    (A graph that was made for several shapes knows none, and would broadcast.)
    """
    if values.shape[axis] is not None:
        return values
    shape = [size if at == axis else None for at in range(len(values.shape))]
    if check is None:
        return tf.ensure_shape(values, shape)
    checked = tf.numpy_function(check, [tf.shape(values)[axis]], [])
    with tf.control_dependencies([checked]):
        return tf.ensure_shape(values, shape)


def value_and_gradients(function: Any) -> tuple[Any, Any]:
    """`function(weights, *arguments)`, and it with gradients, as graphs.

    (On PyTorch as functions.) `weights` is a list of tensors; the function
    returns a number and keeps no state. The second graph returns
    `(value, gradients)`, the gradients a list of dense tensors, zero for a
    weight that the value does not depend on.
    """
    if _is("tensorflow"):

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
    if _is("jax"):
        return jax.jit(function), jax.jit(jax.value_and_grad(function))
    if _is("torch"):
        return _by_torch(function)
    raise RuntimeError(
        "The backend of Keras must be TensorFlow, JAX or PyTorch. "
        f"Received: {name()}."
    )


def _by_torch(function: Any) -> tuple[Any, Any]:
    """`value_and_gradients` on PyTorch, which has no graphs of functions."""

    def evaluated(weights: list[Tensor], *arguments: Any) -> Tensor:
        with torch.no_grad():
            return function(weights, *arguments)

    def differentiated(
        weights: list[Tensor], *arguments: Any
    ) -> tuple[Tensor, list[Tensor]]:
        # The same numbers, at which no other history begins or ends.
        weights = [weight.detach().requires_grad_() for weight in weights]
        with torch.enable_grad():
            value = function(weights, *arguments)
        if not value.requires_grad:  # it depends on none
            return value, [torch.zeros_like(weight) for weight in weights]
        gradients = torch.autograd.grad(
            value, weights, allow_unused=True, materialize_grads=True
        )
        return value.detach(), list(gradients)

    return evaluated, differentiated


def check_no_strategy() -> None:
    """Raises in the scope of a strategy, where Keras divides its losses."""
    if _is("tensorflow") and tf.distribute.has_strategy():
        raise RuntimeError(
            "Losses must be measured outside the scope of a distribution "
            "strategy, inside which Keras divides them by the number of "
            f"replicas. Received: {tf.distribute.get_strategy()!r}."
        )


def read(variable: Any, dtype: str) -> Tensor:
    """The value of a variable as it is now, in a type."""
    if _is("tensorflow"):
        return tf.cast(tf.convert_to_tensor(variable.value), dtype)
    return ops.cast(variable.value, dtype)


def kept_for_gradient(state: Any) -> Any:
    """State of which a backward pass may read what is no parameter.

    On PyTorch a copy: there an assignment writes over the values.
    """
    if not _is("torch"):
        return state

    def copied(value: Any) -> Any:
        return _mapped(lambda x: x.detach().clone(), torch.Tensor, value)

    memory = state.memory
    if memory is not None:
        memory = memory._replace(is_gated=copied(memory.is_gated))
    return state._replace(
        moving_mean=copied(state.moving_mean),
        moving_variance=copied(state.moving_variance),
        limits=copied(state.limits),
        memory=memory,
    )


def keeps_state_backwards() -> bool:
    """Whether a backward pass can write to variables; else `Accumulator`."""
    return not _is("jax")


class Accumulator(Variable):
    """A weight to which an optimizer adds what comes as its gradient. On JAX.

    A gradient of JAX is a pure function: what it changes can leave it as a
    gradient only. For that Keras has weights that ask for it: an optimizer
    neither scales nor clips what comes for them, and makes no slots. It puts
    it in the place of the value. (Its float8 layers remember so.) Here that
    is added to the value: then calls of a layer add up, and a step without
    one, in which zeros come, changes nothing.
    """

    @property
    def overwrite_with_gradient(self) -> bool:
        """`True`, unless who asks would lose what the weight holds.

        Raises:
            NotImplementedError: Where an optimizer accumulates gradients, of
                which it takes the largest for such a weight; or replaces
                weights by their average, which such a weight has not.
        """
        optimizer = _calling_optimizer()
        for name in ("gradient_accumulation_steps", "ema_overwrite_frequency"):
            value = getattr(optimizer, name, None)
            if value and (
                optimizer.use_ema or name != "ema_overwrite_frequency"
            ):
                raise NotImplementedError(
                    f"`{name}` must be None on Keras's JAX backend where a "
                    "layer has a `gradient_momentum`: the optimizer would "
                    "lose what the layer remembers. Make the layers with "
                    f"gradient_momentum=None. Received: {name}={value}."
                )
        return True

    @overwrite_with_gradient.setter
    def overwrite_with_gradient(self, value: bool) -> None:
        """Nothing to set: it always is."""

    def assign(self, value: Any) -> Any:
        """Sets the value; for an optimizer, adds to it."""
        if _calling_optimizer() is not None:
            value = self.value + ops.cast(value, self.dtype)
        return super().assign(value)

    # What `is_read_again` saw.
    _last_read: Any = None

    def is_read_again(self) -> bool:
        """Whether it was asked before, of the value that it has now."""
        value = self.value
        is_known = self._last_read is not None and self._last_read() is value
        self._last_read = weakref.ref(value)
        return is_known


def _calling_optimizer() -> Any:
    """The optimizer that calls what calls this, or `None`."""
    frame: Any = inspect.currentframe()
    caller = frame.f_back.f_back.f_locals.get("self")
    is_optimizer = isinstance(caller, keras.optimizers.Optimizer)
    return caller if is_optimizer else None


def with_accumulators(
    tensors: Sequence[Tensor | None],
    added: Sequence[Any],
    replaced: Sequence[Any],
    dtype: str,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Inputs and parameters of a step, and the values of its accumulators.

    What the step gives as the gradient of such a value is added to the
    variable, once for each time that a gradient of the tensors is computed. Of
    the variables that are `replaced`, the value and what is added to it take
    the place of what the variable holds: of several calls of a layer in a step
    the first one counts, the last of which a gradient is computed.
    That waits for the additions: the backward pass of a graph computes what
    its results need, and nothing else. In a `keras.StatelessScope`, where the
    value of a variable is a tensor, nothing is added, now or later; nor in
    forward mode, which would add what is no gradient.

    On JAX what is to be added is the gradient of the variable, and who takes
    it adds it: an optimizer of Keras does (`Accumulator`).
    """
    first, *parameters = tensors
    tensors = [as_tensor(first), *parameters]
    values = [read(variable, dtype) for variable in (*added, *replaced)]
    if _is("jax"):
        for index, variable in enumerate(replaced, len(added)):
            if variable.is_read_again():
                values[index] = ops.stop_gradient(values[index])
    if _is("jax") or carry_tangents(tensors):
        return tensors, values
    if _is("torch"):
        # The variables are written over before the gradient is taken.
        values = [value.clone() for value in values]
    targets = _targets([*added, *replaced])
    given = [each for each in tensors if each is not None]

    @custom_gradient
    def begin(*arguments: Tensor) -> Any:
        def gradient(*upstream: Tensor) -> tuple[Any, ...]:
            of_tensors, changes = upstream[: len(given)], upstream[len(given) :]
            read_values = arguments[len(given) + len(added) :]
            of_tensors = _after_adding(
                targets, changes, read_values, of_tensors
            )
            # PyTorch makes no zeros that nobody asks for.
            rest = (
                None if _is("torch") else ops.zeros_like(each)
                for each in changes
            )
            return *of_tensors, *rest

        return arguments, gradient

    results = iter(begin(*given, *values))
    tensors = [None if each is None else next(results) for each in tensors]
    return tensors, list(results)


def _targets(variables: Sequence[Any]) -> list[Any]:
    """What a backward pass adds to; `None` in a `keras.StatelessScope`."""
    targets = [variable.value for variable in variables]
    if _is("tensorflow"):
        return [
            each if isinstance(each, tf.Variable) else None for each in targets
        ]
    # In a scope an assigned tensor is the value; outside it is copied.
    value = targets[0].detach().clone()
    variables[0].assign(value)
    if variables[0].value is value:
        return [None] * len(targets)
    return targets


def _after_adding(
    targets: Sequence[Any],
    changes: Sequence[Tensor],
    read_values: Sequence[Tensor],
    tensors: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """The tensors, once the changes have been made.

    The last ones are added to `read_values` and not to what a target holds. Of
    a second derivative zeros come, which are no changes.
    """
    added = []
    olds = [None] * (len(targets) - len(read_values)) + list(read_values)
    for target, change, old in zip(targets, changes, olds, strict=True):
        if target is None:
            continue
        change = ops.cast(change, target.dtype)
        if old is not None:
            new = ops.cast(old, target.dtype) + change - target
            change = ops.where(change == 0, 0.0, new)
        if _is("torch"):
            with torch.no_grad():
                target.add_(change)
        else:
            added.append(target.assign_add(change, read_value=False))
    if _is("torch") or tf.executing_eagerly():
        return tensors
    with tf.control_dependencies(added):
        return tuple(map(tf.identity, tensors))


def to_numpy(value: Any) -> np.ndarray:
    """A copy of the value of a variable, a tensor or an array.

    Neither of the variable itself nor of a tensor of PyTorch, of which NumPy 2
    warns.
    """
    if isinstance(value, Variable):
        value = read(value, value.dtype)
    if _is("torch") and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype != torch.bfloat16:  # which NumPy does not know
            value = value.numpy()
    return np.array(ops.convert_to_numpy(value))
