"""State: reading it, keeping it, and changing it in a backward pass."""

import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
from keras import Variable

from keras_renorm._backend.derivatives import carry_tangents, custom_gradient
from keras_renorm._backend.operations import Tensor, ops
from keras_renorm._backend.runtime import as_tensor, runs_on, tf, torch
from keras_renorm._backend.tracing import mapped


def read(variable: Any, dtype: str) -> Tensor:
    """The value of a variable as it is now, in a type."""
    if runs_on("tensorflow"):
        return tf.cast(tf.convert_to_tensor(variable.value), dtype)
    return ops.cast(variable.value, dtype)


@contextmanager
def kept_buffers(find: Callable[[], Iterable[Any]]) -> Iterator[None]:
    """Puts back what modules of PyTorch in layers hold besides parameters.

    `TorchModuleWrapper` makes variables of these alone: what a module assigns
    to others, such as moving statistics, no scope of Keras drops.
    """
    before = {
        buffer: buffer.clone()
        for layer in (find() if runs_on("torch") else ())
        for buffer in layer.buffers()
    }
    try:
        yield
    finally:
        for buffer, value in before.items():
            # A gradient that is yet to be taken must not know.
            buffer.data.copy_(value)


def kept_for_gradient(state: Any) -> Any:
    """State of which a backward pass may read what is no parameter.

    On PyTorch a copy: there an assignment writes over the values.
    """
    if not runs_on("torch"):
        return state

    def copied(value: Any) -> Any:
        return mapped(lambda x: x.detach().clone(), torch.Tensor, value)

    memory = state.memory
    if memory is not None:
        memory = memory._replace(is_gated=copied(memory.is_gated))
    return state._replace(
        moving_mean=copied(state.moving_mean),
        moving_variance=copied(state.moving_variance),
        limits=copied(state.limits),
        memory=memory,
    )


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
        """`True`, unless an optimizer asks who is to average it.

        Raises:
            NotImplementedError: Where an optimizer accumulates gradients, of
                which it takes the largest for such a weight; or replaces
                weights by their average at any step.
        """
        frame = _frame_of_optimizer()
        if frame is None:
            return True
        optimizer, asking = frame.f_locals["self"], frame.f_back
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
        # An average, which is not of the optimizer's own steps, it may have:
        # `keras.callbacks.SwapEMAWeights` takes all, or fails half-way.
        return asking.f_locals.get("name") != "average"

    @overwrite_with_gradient.setter
    def overwrite_with_gradient(self, value: bool) -> None:
        """Nothing to set: it always is."""

    def assign(self, value: Any) -> Any:
        """Sets the value; what an optimizer gives as a gradient, it adds."""
        frame = _frame_of_optimizer()
        if frame is not None:
            if "gradients" not in frame.f_code.co_name:
                return self.value  # an average, at the end of `fit`
            value = self.value + ops.cast(value, self.dtype)
        return super().assign(value)


def _frame_of_optimizer() -> Any:
    """Of a method of an optimizer that calls what calls this, or `None`."""
    frame: Any = inspect.currentframe()
    frame = frame.f_back.f_back
    caller = frame.f_locals.get("self")
    return frame if isinstance(caller, keras.optimizers.Optimizer) else None


class Calls(threading.local):
    """The calls of a layer in a step, which a thread (a replica) makes.

    A step ends where the first call comes after a gradient was computed.
    """

    def __init__(self) -> None:
        self._made = 0
        self._counted: list[int] = []

    def begin(self) -> Callable[[], bool]:
        """Begins a call.

        Returns:
            What a backward pass asks: whether it is of the first call of the
            step, of those that a gradient was computed of until then.
        """
        if self._counted:
            self._made, self._counted = 0, []
        index, counted = self._made, self._counted
        self._made += 1

        def is_first() -> bool:
            counted.append(index)
            return index == min(counted)

        return is_first

    def __reduce__(self) -> Any:
        """A copy has made no calls."""
        return Calls, ()


def with_accumulators(
    tensors: Sequence[Tensor | None],
    added: Sequence[Any],
    replaced: Sequence[Any],
    dtype: str,
    calls: Calls,
    seen: Any,
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Inputs and parameters of a step, and the values of its accumulators.

    What the step gives as the gradient of such a value is added to the
    variable, once for each time that a gradient of the tensors is computed. Of
    the variables that are `replaced`, the value and what is added to it take
    the place of what the variable holds: of several `calls` of a layer in a
    step the first one counts. That waits for the additions: the backward pass
    of a graph computes what its results need, and nothing else. In a
    `keras.StatelessScope`, where the value of a variable is a tensor, nothing
    is added, now or later; nor in forward mode, which would add what is no
    gradient.

    On JAX what is to be added is the gradient of the variable, and who takes
    it adds it: an optimizer of Keras does (`Accumulator`). Which call counts
    is known there by `seen`, a variable for that (`_counts`).
    """
    first, *parameters = tensors
    tensors = [as_tensor(first), *parameters]
    values = [read(variable, dtype) for variable in (*added, *replaced)]
    if runs_on("jax"):
        counts = _counts(seen, added[-1].value, values[len(added) :])
        values[len(added) :] = [
            ops.where(counts, value, ops.stop_gradient(value))
            for value in values[len(added) :]
        ]
    if runs_on("jax") or carry_tangents(tensors):
        return tensors, values
    if runs_on("torch"):
        # The variables are written over before the gradient is taken.
        values = [value.clone() for value in values]
    targets = _targets([*added, *replaced])
    given = [each for each in tensors if each is not None]
    is_first = calls.begin()

    @custom_gradient
    def begin(*arguments: Tensor) -> Any:
        def gradient(*upstream: Tensor) -> tuple[Any, ...]:
            of_tensors, changes = upstream[: len(given)], upstream[len(given) :]
            olds = [None] * len(added)
            if is_first():
                olds += arguments[len(given) + len(added) :]
            of_tensors = _after_adding(targets, changes, olds, of_tensors)
            # PyTorch makes no zeros that nobody asks for.
            rest = (
                None if runs_on("torch") else ops.zeros_like(each)
                for each in changes
            )
            return *of_tensors, *rest

        return arguments, gradient

    results = iter(begin(*given, *values))
    tensors = [None if each is None else next(results) for each in tensors]
    return tensors, list(results)


def _counts(seen: Any, gate: Tensor, replaced: Sequence[Tensor]) -> Tensor:
    """Whether the call that begins is the one of its step that counts. On JAX.

    Not by what Python sees: a call may be traced once and made often. `seen`
    holds what the call before has seen: the gate, which every step with a
    gradient changes; the sum of what is replaced; the index in its step of the
    call that counts; and its own. The first one counts, unless nothing was
    replaced in the step before: it got no gradient then, and the next one is
    tried.
    """
    before, (total, target, index) = seen.value[:-3], seen.value[-3:]
    is_new = ops.any(gate != before)
    now = ops.cast(sum(map(ops.sum, replaced)), seen.dtype)
    following = ops.where(now == total, target + 1, target)
    following = ops.where(following > index, 0, ops.maximum(following, 0))
    target = ops.where(is_new, following, target)
    index = ops.where(is_new, 0, index + 1)
    total = ops.where(is_new, now, total)
    seen.assign(
        ops.stop_gradient(
            ops.concatenate([gate, ops.stack([total, target, index])])
        )
    )
    return index == target


def _targets(variables: Sequence[Any]) -> list[Any]:
    """What a backward pass adds to; `None` in a `keras.StatelessScope`."""
    # One that has no value of a variable hands out the variable itself.
    with keras.StatelessScope(initialize_variables=False) as inner:
        is_stateless = inner.original_scope is not None
    return [None if is_stateless else each.value for each in variables]


def _after_adding(
    targets: Sequence[Any],
    changes: Sequence[Tensor],
    olds: Sequence[Tensor | None],
    tensors: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """The tensors, once the changes have been made.

    To `olds`, where there are such, and not to what a target holds. Of
    a second derivative nothing but zeros comes, which is no change.
    """
    added = []
    for target, change, old in zip(targets, changes, olds, strict=False):
        if target is None:
            continue
        change = ops.cast(change, target.dtype)
        handle = _handle_in_branch(target)
        if old is not None:
            value = target
            if handle is not None:
                value = tf.raw_ops.ReadVariableOp(
                    resource=handle, dtype=target.dtype
                )
            new = ops.cast(old, target.dtype) + change - value
            change = ops.where(ops.any(change != 0), new, 0.0)
        if runs_on("torch"):
            with torch.no_grad():
                target.add_(change)
        elif handle is not None:
            added.append(
                tf.raw_ops.AssignAddVariableOp(resource=handle, value=change)
            )
        else:
            added.append(target.assign_add(change, read_value=False))
    if runs_on("torch") or tf.executing_eagerly():
        return tensors
    with tf.control_dependencies(added):
        return tuple(map(tf.identity, tensors))


def _handle_in_branch(target: Any) -> Tensor | None:
    """A variable in a branch of a conditional; `None` where there is none.

    The gradient of a branch takes it by way of the graphs around it only. There
    is no public way to ask, so it goes by the class of a graph.
    """
    if not runs_on("tensorflow") or tf.executing_eagerly():
        return None
    graphs = [tf.compat.v1.get_default_graph()]
    while "Cond" in type(graphs[-1]).__name__:
        graphs.append(graphs[-1].outer_graph)
    if len(graphs) == 1:
        return None
    handle = target.handle
    for graph in reversed(graphs):
        handle = graph.capture(handle)
    return handle


def to_numpy(value: Any) -> np.ndarray:
    """A copy of the value of a variable, a tensor or an array.

    Neither of the variable itself nor of a tensor of PyTorch, of which NumPy 2
    warns.
    """
    if isinstance(value, Variable):
        value = read(value, value.dtype)
    if runs_on("torch") and isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype != torch.bfloat16:  # which NumPy does not know
            value = value.numpy()
    return np.array(ops.convert_to_numpy(value))
