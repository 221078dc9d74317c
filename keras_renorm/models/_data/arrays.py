"""A dataset or a batch as arrays, and whether a model takes them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from keras import ops, tree


def check_inputs(model: Any, x: Any, name: str = "dataset") -> None:
    """Raises if a batch of arrays does not fit the inputs of a model.

    Keras checks shapes where it traces a graph, and not again where the graph
    takes a shape that was generalized: a batch of labels is broadcast there.
    """
    inputs = inputs_of(model)
    if not inputs:
        return
    pairs: list[tuple[Any, Any]]
    if isinstance(x, dict):
        # Keras leaves other keys out.
        named = {tensor.name: tensor for tensor in inputs}
        pairs = [(x[key], named[key]) for key in named if key in x]
    else:
        leaves = tree.flatten(x)
        if len(leaves) != len(inputs):
            raise ValueError(
                f"`{name}` must give as many arrays of inputs as the model "
                f"has. Received: {len(leaves)} for {len(inputs)} of "
                f"model={model.name}."
            )
        pairs = list(zip(leaves, inputs, strict=True))
    for array, expected in pairs:
        if array is None:  # of an optional input
            continue
        shape, wanted = tuple(array.shape), tuple(expected.shape)
        if len(shape) > 1 and shape == wanted[1:]:
            raise ValueError(
                f"`{name}` must have a batch axis: give x[np.newaxis] for one "
                f"example. Received: an array of shape {shape}, for {wanted} "
                f"of model={model.name}."
            )
        # Of another rank, Keras adds or drops an axis where it can.
        fits = len(shape) != len(wanted) or all(
            None in sizes or sizes[0] == sizes[1]
            for sizes in zip(shape[1:], wanted[1:], strict=True)
        )
        if not fits:
            raise ValueError(
                f"`{name}` must give inputs of the model's shapes. Received: "
                f"a batch of shape {shape}, for {wanted} of model={model.name}."
            )


def examples_of(x: Any) -> int:
    """Number of examples of a batch's inputs."""
    return next(
        int(leaf.shape[0]) for leaf in tree.flatten(x) if leaf is not None
    )


def inputs_of(model: Any) -> list[Any]:
    """The symbolic inputs of a model, none where it is subclassed."""
    return list(getattr(model, "inputs", None) or [])


def is_array(value: Any) -> bool:
    """Whether a value is an array with a first axis: of examples."""
    return len(getattr(value, "shape", ())) > 0 and (
        ops.is_tensor(value)
        or hasattr(value, "__array__")
        or hasattr(value, "tocsr")  # of SciPy
    )


def is_arrays(structure: Any) -> bool:
    """Whether all is arrays, or `None` for an optional input."""
    leaves = tree.flatten(structure)
    return any(map(is_array, leaves)) and all(
        leaf is None or is_array(leaf) for leaf in leaves
    )


def rows_of(leaf: Any, rows: np.ndarray) -> Any:
    """These rows of an array, a frame or a sparse matrix; `None` of `None`."""
    if leaf is None:
        return None
    if hasattr(leaf, "iloc"):
        return leaf.iloc[rows]
    if hasattr(leaf, "tocsr"):
        return leaf.tocsr()[rows]
    if ops.is_tensor(leaf):
        return ops.take(leaf, rows, axis=0)
    if type(leaf).__module__.startswith("tensorflow"):  # they take no list
        leaf = np.asarray(leaf)
    return leaf[rows]


def as_arrays(dataset: Any, inputs: int) -> tuple[Any, ...] | None:
    """`(x,)`, `(x, y)` or `(x, y, sample_weight)`, if `dataset` is arrays."""
    if isinstance(dataset, Iterator):
        return None
    if isinstance(dataset, list):
        is_flat = all(each is None or is_array(each) for each in dataset)
        if inputs > 1 and len(dataset) == inputs and is_flat:
            return (dataset,)
        _check_list(dataset)
        return None
    if isinstance(dataset, tuple) and dataset:
        x, *others = dataset
        if is_arrays(x):
            _check_parts(others)
            return dataset
        return None
    return (dataset,) if is_arrays(dataset) else None


def _check_list(dataset: list[Any]) -> None:
    """Raises if a list of arrays is inputs and labels, and not batches."""
    if not all(map(is_array, dataset)):
        return
    shapes = [tuple(array.shape) for array in dataset]
    # Batches differ in length, or in what comes between it and the channels.
    ranks, lengths, widths = (
        len(set(found))
        for found in (
            map(len, shapes),
            (shape[0] for shape in shapes),
            (shape[-1] for shape in shapes),
        )
    )
    if ranks > 1 or (lengths == 1 and widths > 1):
        raise ValueError(
            "`dataset` must be a tuple where it is inputs and labels, (x, y), "
            "and hold tuples where it is a list of batches, [(x,), (x,)]. "
            f"Received: a list of arrays of shapes {shapes[:3]}."
        )


def _check_parts(others: list[Any]) -> None:
    """Raises if the parts after x are neither labels nor weights."""
    fits = len(others) <= 2 and all(
        part is None or is_arrays(part) for part in others
    )
    if not fits:
        parts = ["array(s)", *map(described, others)]
        raise TypeError(
            "`dataset` must be x, (x, y) or (x, y, sample_weight), of arrays, "
            f"where it is a tuple. Received: ({', '.join(parts)})."
        )


def length_of(arrays: tuple[Any, ...]) -> int:
    """Number of examples of arrays, which must be the same in all."""
    sizes = {
        int(leaf.shape[0])
        for part in arrays
        for leaf in tree.flatten(part)
        if leaf is not None
    }
    if len(sizes) > 1:
        raise ValueError(
            "`dataset` must hold arrays of the same length. Received: "
            f"lengths {sorted(sizes)}."
        )
    return sizes.pop()


def checked_batch(batch: Any) -> tuple[Any, ...]:
    """A batch of an iterable, of arrays: frames become such."""
    parts = tuple(batch) if isinstance(batch, list | tuple) else (batch,)
    if not 1 <= len(parts) <= 3 or not is_arrays(parts[0]):
        found = ", ".join(map(described, parts[:4]))
        raise TypeError(
            "`dataset` must give batches of arrays: x, (x, y) or (x, y, "
            f"sample_weight). Received: a batch of {found}."
        )
    return tuple(
        tree.map_structure(converted, part)
        if part is not None and is_arrays(part)
        else part
        for part in parts
    )


def converted(leaf: Any) -> Any:
    """A frame as an array; of a series a column, as Keras makes it."""
    if leaf is None or isinstance(leaf, np.ndarray) or ops.is_tensor(leaf):
        return leaf
    if hasattr(leaf, "toarray"):
        return leaf.toarray()
    array = np.asarray(leaf)
    if array.ndim == 1 and hasattr(leaf, "to_frame"):
        return array[:, np.newaxis]
    return array


def described(value: Any) -> str:
    """The class of a value, for messages: arrays print at length."""
    return f"<{type(value).__name__}>"
