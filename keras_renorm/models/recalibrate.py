"""Population statistics of the weights that a model has now."""

import math
import weakref
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import keras
import numpy as np

from keras_renorm._backend.operations import Tensor
from keras_renorm._backend.variables import to_numpy
from keras_renorm._checks import check_boolean, check_number
from keras_renorm._step.moments import centered_moments
from keras_renorm.models._data.arrays import examples_of
from keras_renorm.models._data.batches import Batches
from keras_renorm.models._data.feeding import Feed
from keras_renorm.models._data.passes import (
    Calls,
    LayerCall,
    Reports,
    aligned_inputs,
    example_moments,
    normalized_by_batch,
    reached_layers,
)
from keras_renorm.models._data.totals import Total, warn_of_likeness
from keras_renorm.models._layers.finding import (
    Choice,
    built_layers,
    check_no_keras_renorm,
    describe,
    names_of,
)
from keras_renorm.models._layers.graphs import (
    compiled,
    forgotten_after_errors,
    kept,
)


def recalibrate(
    model: keras.Model,
    dataset: Any,
    steps: int | None = None,
    *,
    layers: Choice = None,
    layer_by_layer: bool | None = None,
    prior_examples: float = 0.0,
    batch_size: int = 32,
    verbose: int | bool = True,
) -> None:
    """Replaces moving statistics by those of a dataset, in place.

    Moving averages lag behind the weights, remember a training domain, or
    are those of other batches. This computes mean and variance of each layer's
    input over the dataset, with the weights as they are ("precise BN", Wu and
    Johnson 2021): pooled by count, with the law of total variance, so that how
    the data is cut into batches does not matter for a layer's own input. (In a
    class of your own, that is what its `call` hands to `super().call`, if so.)

    In one pass, batch normalization normalizes with the statistics of the batch
    on the way, everything else infers: deeper layers see the outputs of that.
    With `layer_by_layer=True` there is a pass for each layer, from the first
    on, and the layers before it use their new statistics: exactly as in
    inference, however the data is cut, at the cost of a pass a layer. (A layer
    that feeds itself, in a recurrent cell, say, uses its old statistics in its
    own pass.)

    A single element of a channel, normalized by itself, is zero, and says
    nothing of the data. So one pass leaves out later inputs of such a batch:
    a last batch of one does no harm. Where most of a layer's elements would be
    left out, there is a pass for each layer instead.

    Layers count wherever they are called: in nested models, recurrent cells,
    loops and conditionals, once for each time that they run. A layer that no
    data reaches keeps its statistics, with a warning: one that is not called,
    or whose outputs nobody uses, or in a function that the model has compiled
    by itself (`tf.function`, `jax.jit`), which is not traced again.

    The data is read by the model's own `predict`, and goes in as the model's
    own `predict_step`, `test_step` or `train_step` first calls the model with
    it.
    A loop over calls of this function traces the model once.

    Only moving statistics change: no other weight, no step counter, no limit,
    no state of a recurrent layer (each batch begins with the present one).
    They change at the end, and not at all if anything fails. Frozen layers
    (`frozen_statistics`, `trainable=False`) are recalibrated too: this is not
    training.

    Args:
        model: A built model with batch normalization, Keras's or ours.
        dataset: Inputs of the model: an array, a frame of pandas or a sparse
            matrix of SciPy (or a structure of them, where the model has several
            inputs; `None` for an optional one), a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a loader of PyTorch, or another iterable
            of batches. All, and batches, are as for `fit`: `x`, `(x, y)` or
            `(x, y, sample_weight)`; only `x` is used. A tuple of arrays is
            the latter; a list of arrays is the inputs of a model with as
            many, or else batches, but never inputs and labels.
        steps: Number of batches, or `None` (default) for all. Of arrays, so
            many batches of examples that are drawn at random, from all of them.
        layers: Which layers: a function of a layer that returns whether it is
            meant, a class, a layer or its name, or a list of such. A block or
            a nested model means all batch normalization in it. Defaults to
            `None`, for all. The others infer, with the statistics that they
            have.
        layer_by_layer: Whether to make a pass for each layer. The dataset must
            be one that can be read again. `None` (default): where there are
            `prior_examples`, so that each layer is measured after layers that
            normalize by the mixture, as they will; and where batches hold one
            element a channel.
        prior_examples: Weight of the present statistics, in examples: N in
            N / (N + n) of the old and n / (N + n) of the new, for n examples
            seen (Schneider et al. 2020, section 3.1). 0 (default) drops them.
        batch_size: Examples a batch where `dataset` is arrays.
        verbose: Whether to show a progress bar.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If an argument is out of range; if the model has no batch
            normalization, or is not built, or has Keras layers with
            `renorm=True` (`convert` them); if `layers` chooses none, or
            layers that are not in the model; if the dataset is empty, holds
            fewer than `steps` batches, never ends without `steps`, does not
            fit the model's inputs or a layer's channels, is a list of inputs
            and labels, reaches no layer, or makes statistics that are not
            finite; if batches hold one element a channel and the data
            cannot be read again, or `layer_by_layer` is `False`.

    Warns:
        UserWarning: Of layers that no data reached; and if the examples of a
            batch are alike (data sorted by class), for the statistics of
            deeper layers are then those of such batches.

    Example:

    >>> model = keras.Sequential([keras.Input((2,)), BatchNormalization()])
    >>> x = np.random.normal(5.0, 2.0, (100, 2)).astype("float32")
    >>> recalibrate(model, x, verbose=False)
    >>> bool(np.allclose(model.layers[0].moving_mean, x.mean(axis=0)))
    True

    References:
        Wu and Johnson 2021, arXiv:2105.07576, section 3. Schneider et al.
        2020, arXiv:2006.16971, section 3.1.
    """
    statistics_pass(model, layers).run(
        dataset,
        steps,
        layer_by_layer=layer_by_layer,
        prior_examples=prior_examples,
        batch_size=batch_size,
        verbose=verbose,
    )


class _OneElementError(ValueError):
    """One pass does not see most elements of a layer as they are."""


def statistics_pass(model: Any, layers: Choice = None) -> "StatisticsPass":
    """The pass for layers of a model, with the graphs that it has traced."""
    chosen = built_layers(model, layers)
    check_no_keras_renorm(chosen)
    return kept(
        model,
        "statistics",
        tuple(chosen),
        lambda: StatisticsPass(model, chosen),
    )


class StatisticsPass:
    """Passes over data that gather the moments of a model's layers."""

    def __init__(self, model: Any, layers: Sequence[Any]) -> None:
        self._model = weakref.ref(model)
        self.layers = layers
        # Which layers were called, in order; known once a batch was seen.
        self._called: list[Any] = []
        self._reports = Reports()
        # A graph for each way to normalize, made on the first batch.
        self._gather = {
            by_batch: compiled(model, self._run_model)
            for by_batch in (True, False)
        }

    def run(
        self,
        dataset: Any,
        steps: int | None,
        *,
        layer_by_layer: bool | None = None,
        prior_examples: float = 0.0,
        batch_size: int = 32,
        verbose: int | bool = True,
    ) -> None:
        """As `recalibrate`."""
        data, prior, is_by_layer = self.checked(
            dataset, steps, layer_by_layer, prior_examples, batch_size
        )
        before = {
            id(layer): [
                to_numpy(weight)
                for weight in (layer.moving_mean, layer.moving_variance)
            ]
            for layer in self.layers
        }
        if not is_by_layer:
            try:
                totals = self._totals(data, True, verbose)
            except _OneElementError:
                if layer_by_layer is not None or not data.is_repeatable:
                    raise
            else:
                for layer in self.layers:
                    if id(layer) in totals:
                        _mix(layer, before[id(layer)], totals[id(layer)], prior)
                return
        try:
            self._run_by_layer(data, before, prior, verbose)
        except BaseException:
            for layer in self.layers:
                layer.moving_mean.assign(before[id(layer)][0])
                layer.moving_variance.assign(before[id(layer)][1])
            raise

    def _run_by_layer(
        self,
        data: Batches,
        before: dict[int, list[np.ndarray]],
        prior: float,
        verbose: int | bool,
    ) -> None:
        """A pass for each layer, in the order that they are called."""
        done: set[int] = set()
        reached = 1
        while len(done) < reached:
            totals = self._totals(data, False, verbose, done)
            reached = len(totals)
            layer = next(
                called
                for called in self._called
                if id(called) in totals.keys() - done
            )
            _mix(layer, before[id(layer)], totals[id(layer)], prior)
            done.add(id(layer))

    def checked(
        self,
        dataset: Any,
        steps: int | None,
        layer_by_layer: bool | None = None,
        prior_examples: float = 0.0,
        batch_size: int = 32,
    ) -> tuple[Batches, float, bool]:
        """The batches, the prior, and whether there is a pass a layer.

        If the arguments are those of `run`.
        """
        prior = check_number("prior_examples", prior_examples)
        if not 0 <= prior < math.inf:
            raise ValueError(
                "`prior_examples` must be finite and not negative. Received: "
                f"prior_examples={prior_examples}."
            )
        is_by_layer = prior > 0
        if layer_by_layer is not None:
            is_by_layer = check_boolean("layer_by_layer", layer_by_layer)
        data = Batches(dataset, steps, batch_size, self._model(), is_drawn=True)
        if is_by_layer:
            data.check_repeatable()
        return data, prior, is_by_layer

    def _totals(
        self,
        data: Batches,
        by_batch: bool,
        verbose: int | bool,
        done: Collection[int] = (),
    ) -> dict[int, Total]:
        """The pooled moments of the layers that data reaches, by `id`."""
        totals = {id(layer): Total() for layer in self.layers}
        # Of the layer that is called first: inputs of later ones mix examples.
        of_examples = Total()

        def count(feed: Feed, _: Any, calls: Calls) -> None:
            skipped = set()
            # One element normalized by itself is zero: later inputs say
            # nothing of the data.
            is_lost = False
            for layer, (moments, examples) in calls:
                if is_lost:
                    skipped.add(id(layer))
                    totals[id(layer)].skipped += np.max(moments.count)
                else:
                    totals[id(layer)].add(*moments)
                    if layer is calls[0][0]:
                        of_examples.add(*examples)
                is_lost |= by_batch and np.max(moments.count) == 1
            for at, total in totals.items():
                if at not in skipped:
                    total.examples += examples_of(feed.x)

        if verbose and not by_batch:
            print(f"layer {len(done) + 1} of {len(self.layers)}")
        with forgotten_after_errors(self._model()):
            seen = self._reports.run_over(
                data,
                self.layers,
                partial(self._hook, by_batch=by_batch),
                self._gather[by_batch],
                count,
                verbose,
            )
        self._check_elements(data.model, totals)
        reached = reached_layers(
            data.model,
            [(layer, totals[id(layer)]) for layer in self.layers],
            seen,
            "statistics",
            is_silent=bool(done),
        )
        if by_batch and len(reached) > 1:
            first = self._called[0]
            (name,) = names_of(data.model, [first])
            warn_of_likeness(first, name, totals[id(first)], of_examples)
        return {id(layer): totals[id(layer)] for layer in reached}

    def _check_elements(self, model: Any, totals: dict[int, Total]) -> None:
        """Raises where most elements of a layer had to be left out."""
        lost = [
            layer
            for layer in self.layers
            if totals[id(layer)].skipped
            and totals[id(layer)].skipped >= totals[id(layer)].count
        ]
        if lost:
            raise _OneElementError(
                "`dataset` must hold batches of two elements a channel or "
                "more, or be read with layer_by_layer=True, which needs data "
                "that can be read again. Received: one element a channel, "
                f"normalized by itself, before {describe(lost, model)}."
            )

    def _run_model(self, x: Any, named: dict[str, Any]) -> Any:
        self._called = []
        model: Any = self._model()
        # Assignments in inference (of a stateful layer) are dropped.
        with keras.StatelessScope():
            return model(x, training=False, **named)

    def _hook(self, layer: Any, call: LayerCall, by_batch: bool) -> Tensor:
        values, axis, mask = aligned_inputs(layer, call.inputs, call.mask)
        centered, moments = centered_moments(values, (axis,), mask)
        self._called.append(layer)
        if by_batch:
            outputs = normalized_by_batch(
                layer, call, centered, axis, moments, mask
            )
        else:
            outputs = call.run(call.training)
        return self._reports.report(
            layer, (moments, example_moments(values, axis, mask)), outputs
        )


def _mix(
    layer: Any, before: list[np.ndarray], total: Total, prior: float
) -> None:
    """Assigns new statistics, and old ones by the weight of a prior."""
    keep = prior / (prior + total.examples) if prior else 0.0
    for weight, old, new in (
        (layer.moving_mean, before[0], total.mean),
        (layer.moving_variance, before[1], total.variance),
    ):
        # What is not finite counts for nothing: zero times NaN is NaN.
        old = np.where(np.isfinite(old), old, new)
        weight.assign(keep * old + (1 - keep) * new)
