"""Training calls that a backward pass repeats, to save memory.

`keras.remat` computes its function a second time where the gradient is taken,
and so calls the layers inside twice in one step. The second call of a layer
must begin with the state that the first one began with, or it is another
function; and it must not move the state again.
"""

from collections.abc import Sequence
from typing import Any

import keras

from keras_renorm._backend.operations import Tensor, ops
from keras_renorm._step.records import State

# So many calls of `keras.remat`, the last ones, are remembered by a layer.
MOST_CALLS = 64


class _Call:
    """What a layer's calls began with, in one call of `keras.remat`."""

    def __init__(self, key: Any) -> None:
        self.key = key
        self.states: list[State] = []
        self.repeated = 0


class Memory:
    """What a layer's calls began with, where they may be repeated."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self._graph: Any = None

    def remember(
        self, keys: Sequence[Any], inputs: Tensor, state: State
    ) -> None:
        """Keeps the state that a call of the layer begins with.

        `keys` are those of the calls of `keras.remat` whose first pass it is.
        """
        graph = getattr(inputs, "graph", None)
        if graph is not self._graph:  # which the tensors would keep
            self._graph, self._calls = graph, []
        # Gamma and beta stay what they are, and gradients are of those that
        # the second pass reads. (On PyTorch an assignment writes over values.)
        state = state._replace(gamma=None, beta=None, memory=None)
        state = keras.tree.map_structure(
            lambda value: ops.copy(value) if ops.is_tensor(value) else value,
            state,
        )
        for key in keys:
            call = self._find(key)
            if call is None:
                call = _Call(key)
                self._calls = [*self._calls[1 - MOST_CALLS :], call]
            call.states.append(state)

    def recall(self, key: Any, state: State) -> State:
        """What the first pass began with, where this is the second.

        Raises:
            RuntimeError: If it is not known.
        """
        call = self._find(key)
        if call is None:
            raise RuntimeError(
                "A layer must be in one graph, and in at most "
                f"{MOST_CALLS} calls of `keras.remat` in a step: the "
                "state that a repeated call began with is no longer known."
            )
        first = call.states[call.repeated % len(call.states)]
        call.repeated += 1
        return first._replace(
            gamma=state.gamma, beta=state.beta, memory=state.memory
        )

    def _find(self, key: Any) -> _Call | None:
        return next((each for each in self._calls if each.key is key), None)
