"""Batch normalization folded into the layer before it."""

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from keras_renorm._backend.variables import to_numpy
from keras_renorm._checks import check_model
from keras_renorm.models._layers.calls import has_own_call
from keras_renorm.models._layers.configuration import config_of
from keras_renorm.models._layers.finding import Choice, built_layers, has_graph
from keras_renorm.models._surgery.copying import (
    check_has_graph,
    copy_model,
    graph_of,
)

# The kernel that makes the outputs, and the axis of it that counts them. A
# depthwise kernel has two: inputs, and outputs for each.
_KERNELS: dict[type, tuple[str, tuple[int, ...]]] = {
    layers.Dense: ("kernel", (-1,)),
    layers.Conv1D: ("kernel", (-1,)),
    layers.Conv2D: ("kernel", (-1,)),
    layers.Conv3D: ("kernel", (-1,)),
    layers.Conv1DTranspose: ("kernel", (-2,)),
    layers.Conv2DTranspose: ("kernel", (-2,)),
    layers.Conv3DTranspose: ("kernel", (-2,)),
    layers.DepthwiseConv1D: ("kernel", (-2, -1)),
    layers.DepthwiseConv2D: ("kernel", (-2, -1)),
    layers.SeparableConv1D: ("pointwise_kernel", (-1,)),
    layers.SeparableConv2D: ("pointwise_kernel", (-1,)),
}


# Above half of the largest number of the type, the sum that the bias is added
# to may overflow, or the weights do.
_LARGEST = {"float16": 65504.0 / 2}


class _Pair(NamedTuple):
    before: Any
    normalization: Any
    kernel: np.ndarray
    bias: np.ndarray


def fold(model: keras.Model, *, layers: Choice = None) -> keras.Model:
    """A copy of a model, for inference, without the normalization it can lose.

    Batch normalization right after a Dense, Conv1D, Conv2D, Conv3D (or their
    transposes), DepthwiseConv or SeparableConv layer without an activation
    becomes part of its kernel and bias:

        kernel = kernel * gamma / sqrt(moving_variance + epsilon)
        bias   = (bias - moving_mean) * gamma / sqrt(...) + beta

    so that inference does less. Outputs are the same to rounding, and keep
    their names (normalization that makes one, or changes the type, becomes an
    `Identity`). `model` is not changed. Do not train the copy: nothing
    normalizes its activations.

    Args:
        model: A built sequential or functional model with batch normalization
            of Keras or of this package.
        layers: Which layers, as for `recalibrate`. Defaults to `None`, for
            all.

    Returns:
        A new model. The normalization that remains in it infers as before.

    Raises:
        ValueError: If the model is neither sequential nor functional, is not
            built, or has no batch normalization; if `layers` chooses none, or
            layers that are not in the model.

    Warns:
        UserWarning: What of `layers` was not folded, and why: another layer, an
            activation or a branch is between the two, a layer is shared, the
            normalization is inside a wrapper, it always trains (called with
            `training=True`), or float16 does not hold the folded weights.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((4,)), keras.layers.Dense(3), BatchNormalization(),
    ... ])
    >>> [type(layer).__name__ for layer in fold(model).layers]
    ['Dense']
    """
    check_has_graph(check_model(model))
    normalizations = built_layers(model, layers)
    chosen = {id(layer) for layer in normalizations}
    pairs, reasons = _find_pairs(model)
    pairs = [pair for pair in pairs if id(pair.normalization) in chosen]
    folded = {id(pair.normalization) for pair in pairs}
    new_model, copies = copy_model(
        model,
        [pair.before for pair in pairs],
        lambda layer, config: (type(layer), {**config, "use_bias": True}),
        folded,
    )
    for pair in pairs:
        _write_folded(pair, copies[id(pair.before)])
    left = [layer for layer in normalizations if id(layer) not in folded]
    if left:
        warnings.warn(
            f"{len(left)} of {len(normalizations)} batch normalization layers "
            "are not folded: "
            + "; ".join(
                f"{layer.name} ({reasons.get(id(layer), 'inside a wrapper')})"
                for layer in left
            )
            + ".",
            stacklevel=2,
        )
    return new_model


def _graphs_of(
    model: keras.Model, trains: bool = False
) -> dict[int, tuple[keras.Model, bool]]:
    """A model and the models nested in it, not those inside wrappers.

    And whether each is always called with `training=True`, or once at least.
    """
    if not has_graph(model):
        return {}
    graphs = {id(model): (model, trains)}
    calls = _calls_of(model)
    for layer in model.layers:
        always = trains or any(map(_trains, calls.get(layer.name, [])))
        for key, (graph, flag) in _graphs_of(layer, always).items():
            graphs[key] = graph, flag or graphs.get(key, (graph, False))[1]
    return graphs


def _calls_of(graph: keras.Model) -> dict[str, list[Any]]:
    """By the names of layers, their serialized calls; of a sequence none."""
    if isinstance(graph, keras.Sequential):
        return {}
    layers = config_of(graph_of(graph))["layers"]
    return {layer["name"]: layer["inbound_nodes"] for layer in layers}


def _trains(call: dict[str, Any]) -> bool:
    return bool(call["kwargs"].get("training"))


def _find_pairs(model: keras.Model) -> tuple[list[_Pair], dict[int, str]]:
    """What can be folded, and by `id` why other normalization cannot."""
    graphs = _graphs_of(model)
    # A layer in two graphs is shared, as is one that a graph calls twice.
    uses = Counter(
        id(layer) for graph, _ in graphs.values() for layer in graph.layers
    )
    pairs, reasons = [], {}
    for graph, trains in graphs.values():
        for normalization, before, reason in _candidates(graph):
            if not reason and trains:
                reason = f"{graph.name} is called with training=True"
            if (
                not reason
                and max(uses[id(normalization)], uses[id(before)]) > 1
            ):
                reason = "a layer is shared"
            reason = reason or _why_not(before, normalization)
            if not reason:
                pair = _Pair(
                    before, normalization, *_folded(before, normalization)
                )
                reason = _why_not_finite(pair)
            if reason:
                reasons[id(normalization)] = reason
            else:
                pairs.append(pair)
    return pairs, reasons


def _candidates(graph: keras.Model) -> Iterator[tuple[Any, Any, str]]:
    """Each normalization, the layer before it, why they cannot be joined."""
    if isinstance(graph, keras.Sequential):
        for at, layer in enumerate(graph.layers):
            if isinstance(layer, layers.BatchNormalization):
                if at == 0:
                    yield layer, None, "it comes first"
                else:
                    yield layer, graph.layers[at - 1], ""
        return
    named = {layer.name: layer for layer in graph.layers}
    calls = _calls_of(graph)
    readers = Counter(
        source
        for nodes in calls.values()
        for node in nodes
        for source in _sources(node)
    )
    # What the model returns has a reader too.
    readers.update(_output_sources(config_of(graph_of(graph))["output_layers"]))
    for name, layer in named.items():
        if not isinstance(layer, layers.BatchNormalization):
            continue
        if len(calls[name]) != 1:
            yield layer, None, "it is shared"
            continue
        sources = list(_sources(calls[name][0]))
        before = named.get(sources[0][0]) if len(sources) == 1 else None
        if _trains(calls[name][0]):
            yield layer, before, "it is called with training=True"
        elif before is None:
            yield layer, None, "no single layer comes before it"
        elif len(calls[before.name]) > 1:
            yield layer, before, f"{before.name} is shared"
        elif readers[sources[0]] != 1:
            yield layer, before, f"{before.name} has other readers"
        else:
            yield layer, before, ""


def _sources(node: Any) -> Iterator[tuple[Any, ...]]:
    """Layer name, call and output of each tensor in a serialized call."""
    if isinstance(node, dict):
        if node.get("class_name") == "__keras_tensor__":
            yield tuple(node["config"]["keras_history"])
        else:
            for value in node.values():
                yield from _sources(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _sources(value)


def _output_sources(node: Any) -> Iterator[tuple[Any, ...]]:
    if isinstance(node, dict):
        for value in node.values():
            yield from _output_sources(value)
    elif len(node) == 3 and isinstance(node[0], str):
        yield tuple(node)
    else:
        for value in node:
            yield from _output_sources(value)


def _why_not(before: Any, normalization: Any) -> str:
    """Why a layer cannot absorb the normalization after it; empty if it can."""
    if has_own_call(normalization):
        return f"{type(normalization).__name__} has a call of its own"
    if type(before) not in _KERNELS:
        return f"it follows {before.name}, a {type(before).__name__}"
    if before.activation is not keras.activations.linear:
        return f"{before.name} has an activation"
    if getattr(before, "quantization_mode", None) or getattr(
        before, "lora_enabled", False
    ):
        return f"{before.name} is quantized or has LoRA weights"
    rank = normalization.input_spec.ndim
    channels = rank - 1
    if getattr(before, "data_format", "") == "channels_first":
        channels = 1
    if normalization.axis % rank != channels:
        return f"it normalizes axis {normalization.axis}"
    return ""


def _folded(before: Any, normalization: Any) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and bias of both layers as one, in float64."""
    name, axes = _KERNELS[type(before)]

    def values_of(weight: Any, default: float) -> Any:
        if weight is None:
            return default
        return to_numpy(weight).astype("float64")

    mean = values_of(normalization.moving_mean, 0.0)
    variance = values_of(normalization.moving_variance, 1.0)
    scale = values_of(normalization.gamma, 1.0) / np.sqrt(
        variance + normalization.epsilon
    )
    bias = values_of(before.bias, 0.0)
    bias = (bias - mean) * scale + values_of(normalization.beta, 0.0)
    kernel = values_of(getattr(before, name), 0.0)
    around = [1] * kernel.ndim
    for axis in axes:
        around[axis] = kernel.shape[axis]
    return kernel * scale.reshape(around), bias


def _why_not_finite(pair: _Pair) -> str:
    kind = pair.before.compute_dtype
    largest = max(
        np.max(np.abs(weights)) for weights in (pair.kernel, pair.bias)
    )
    if largest > _LARGEST.get(kind, np.inf):
        return f"{kind} does not hold what {pair.before.name} would get"
    return ""


def _write_folded(pair: _Pair, new: Any) -> None:
    name, _ = _KERNELS[type(pair.before)]
    getattr(new, name).assign(pair.kernel)
    new.bias.assign(pair.bias)
    if hasattr(new, "depthwise_kernel"):
        new.depthwise_kernel.assign(to_numpy(pair.before.depthwise_kernel))
