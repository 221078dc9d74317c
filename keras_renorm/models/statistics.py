"""The moving statistics of a whole model, as arrays."""

import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_renorm._backend.variables import to_numpy
from keras_renorm.models._layers.finding import (
    LISTED,
    Choice,
    built_layers,
    choose_layers,
    names_of,
)

Statistics = dict[str, np.ndarray]
_KINDS = ("moving_mean", "moving_variance")
# What Keras and this package put after names that would be alike.
_NUMBERS = re.compile(r"([_:]\d+)*$")


def get_statistics(model: keras.Model, *, layers: Choice = None) -> Statistics:
    """Copies of the moving means and variances of a model.

    A bank of statistics, one a domain, is what a network needs to serve
    several (Li et al. 2016, arXiv:1603.04779, "AdaBN"). To keep one on disk:

        np.savez("night.npz", **get_statistics(model))
        set_statistics(model, "night.npz")

    Args:
        model: A built model with batch normalization, Keras's or ours, at any
            depth.
        layers: Which layers, as for `recalibrate`. Defaults to `None`, for
            all.

    Returns:
        Arrays of shape `(channels,)` by name: `"<layer>/moving_mean"` and
        `"<layer>/moving_variance"`. `<layer>` is `layer.name`; where layers of
        the model share a name, the path in the model: the names of the layers
        that hold it and its own, as in `"encoder/block/bn"`. Where they share
        that too, numbers follow: `"block/bn:1"`, `"block/bn:2"`. Reports call
        a layer the same, and `layers=` takes these names.

    Raises:
        TypeError, ValueError: If the model has no batch normalization, or is
            not built; if `layers` chooses none, or
            layers that are not in the model.

    Warns:
        UserWarning: If the model holds layers that it never called; they are
            left out.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((2,)), BatchNormalization(name="bn")
    ... ])
    >>> sorted(get_statistics(model))
    ['bn/moving_mean', 'bn/moving_variance']
    """
    chosen = built_layers(model, layers)
    return {
        f"{name}/{kind}": to_numpy(getattr(layer, kind))
        for name, layer in zip(names_of(model, chosen), chosen, strict=True)
        for kind in _KINDS
    }


def set_statistics(
    model: keras.Model,
    statistics: Mapping[str, Any] | str | os.PathLike[str],
    *,
    layers: Choice = None,
) -> None:
    """Puts moving means and variances into a model, in place.

    Nothing else changes, and nothing at all if something does not fit.

    Layers are matched by name. Where the numbers in names are those of another
    session, or names are those of an earlier version or of a part of the model,
    they are matched by the rest of the names, and in their order; a warning
    says which.

    Args:
        model: A built model with batch normalization, at any depth.
        statistics: What `get_statistics` returns, of all layers that are set
            or of the whole model; or the path of a file of `np.savez` with it.
        layers: Which layers to set, as for `get_statistics`. Defaults to
            `None`, for all.

    Raises:
        TypeError: If `statistics` is neither arrays by name nor a path.
        ValueError: If the model has no batch normalization, or is not built;
            if names or shapes are not the model's; if a value is not finite,
            or a variance negative; if `layers` chooses none, or layers
            that are not in the model.

    Warns:
        UserWarning: What is matched by order; layers that the model holds and
            never called.

    Example:

    >>> model = keras.Sequential([
    ...     keras.Input((2,)), BatchNormalization(name="bn")
    ... ])
    >>> bank = get_statistics(model)
    >>> bank["bn/moving_mean"] += 3
    >>> set_statistics(model, bank)
    >>> model.layers[0].moving_mean.numpy().tolist()
    [3.0, 3.0]
    """
    chosen = built_layers(model, layers)
    everything = [layer for layer in choose_layers(model) if layer.built]
    names = names_of(model, chosen)
    bank = _read(statistics)
    sources = _sources(bank, names, names_of(model, everything))
    values = {}
    for name, layer in zip(names, chosen, strict=True):
        for kind in _KINDS:
            key = f"{sources[name]}/{kind}"
            weight, value = getattr(layer, kind), bank[key]
            _check_values(key, value, tuple(weight.shape))
            values[id(weight)] = weight, value
    by_order = [
        f"{source} -> {name}"
        for name, source in sources.items()
        if name != source
    ]
    if by_order:
        more = ", ..." if len(by_order) > LISTED else ""
        warnings.warn(
            "Statistics are matched by order, for their names are those of "
            "another session, of an earlier version or of a part: "
            f"{', '.join(by_order[:LISTED])}{more}. Layers that you name are "
            "matched by name.",
            stacklevel=2,
        )
    for weight, value in values.values():
        weight.assign(value)


def _read(statistics: Any) -> dict[str, np.ndarray]:
    """The arrays of a bank, or of its file."""
    if isinstance(statistics, str | os.PathLike):
        try:
            found: Any = np.load(statistics)
        except ValueError:  # no file of NumPy
            found = None
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ValueError(
                "`statistics` must be the path of a file of `np.savez` with "
                "what `get_statistics` returns. Received: "
                f"statistics={str(statistics)!r}, another kind of file."
            )
        with found:
            return dict(found)
    if not isinstance(statistics, Mapping):
        raise TypeError(
            "`statistics` must be what `get_statistics` returns, or the path "
            "of a file of `np.savez` with it. Received: an object of type "
            f"{type(statistics).__name__}."
        )
    return {key: np.array(value) for key, value in statistics.items()}


def _sources(
    bank: Mapping[str, Any], names: Sequence[str], every: Sequence[str]
) -> dict[str, str]:
    """What a bank calls each of some layers.

    Args:
        bank: Arrays by name.
        names: Names of the layers.
        every: Names of all layers of the model.
    """
    given = list(dict.fromkeys(key.rpartition("/")[0] for key in bank))
    sources: dict[str, str] | None = None
    if set(bank) == {f"{name}/{kind}" for name in given for kind in _KINDS}:
        if set(names) <= set(given) <= set(every):
            return dict(zip(names, names, strict=True))
        is_whole = len(given) != len(names) or len(names) == len(every)
        sources = _matched(every if is_whole else names, given, is_whole)
    if sources is None:
        wanted = {f"{name}/{kind}" for name in names for kind in _KINDS}
        missing = sorted(wanted - set(bank))
        unknown = sorted(set(bank) - wanted)
        raise ValueError(
            "`statistics` must be those of the same architecture. Received: "
            f"{len(bank)} arrays for {len(wanted)}; missing {missing[:4]}, "
            f"unknown {unknown[:4]}."
        )
    return {name: sources[name] for name in names}


def _matched(
    names: Sequence[str], given: Sequence[str], is_whole: bool
) -> dict[str, str] | None:
    """For each name one that is given; `None` if they are others.

    First by as much of the paths as tells layers apart, for those of a part are
    shorter; names that differ in numbers only, in the order of the numbers: a
    file may be sorted. An earlier version had numbers in the place of paths:
    the others of a whole model are taken in its order.
    """
    matched: dict[str, str] = {}
    left, rest = list(names), list(given)
    longest = max(name.count("/") for name in [*left, *rest, ""]) + 1
    for parts in range(longest, 0, -1):
        ours, theirs = _by_stem(left, parts), _by_stem(rest, parts)
        for stem, group in ours.items():
            if len(group) == len(theirs.get(stem, ())):
                matched |= dict(zip(group, theirs[stem], strict=True))
        left = [name for name in names if name not in matched]
        rest = [name for name in given if name not in matched.values()]
    if (left and not is_whole) or list(map(_kind, left)) != list(
        map(_kind, rest)
    ):
        return None
    return matched | dict(zip(left, rest, strict=True))


def _by_stem(names: Iterable[str], parts: int) -> dict[str, list[str]]:
    """Names in the order of their numbers, by what they are without.

    Args:
        names: Names, or paths.
        parts: How much of a path counts, from its end. Names that are alike
            in it are left out.
    """
    groups: dict[str, list[tuple[tuple[int, ...], str]]] = {}
    for name in names:
        found = [
            re.fullmatch(r"(.*?)(?:_(\d+))?", part)
            for part in name.split("/")[-parts:]
        ]
        stem = "/".join(match[1] for match in found if match)
        numbers = tuple(int(match[2] or 0) for match in found if match)
        groups.setdefault(stem, []).append((numbers, name))
    return {
        stem: [name for _, name in sorted(group)]
        for stem, group in groups.items()
        if len({numbers for numbers, _ in group}) == len(group)
    }


def _kind(name: str) -> str:
    """A name without its path and its numbers."""
    return _NUMBERS.sub("", name.rpartition("/")[2])


def _check_values(key: str, value: np.ndarray, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(
            "`statistics` must have the shapes of the model's. Received: "
            f"{key} of shape {value.shape}, for {shape}."
        )
    is_variance = key.endswith(_KINDS[1])
    if not np.all(np.isfinite(value)) or (is_variance and value.min() < 0):
        raise ValueError(
            "`statistics` must be finite, and variances not negative. "
            f"Received: {key}={value}."
        )
