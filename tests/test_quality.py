"""The quality benchmark: what its figures mean, and that they repeat."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_renorm import BatchRenormalization
from tests.helpers import assert_close, raises
from tests.reference import Reference

FOLDER = Path(__file__).parent.parent / "benchmarks" / "quality"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.tensorflow,
    pytest.mark.skipif(not FOLDER.exists(), reason="without the benchmarks"),
]


@pytest.fixture
def quality(monkeypatch):
    """Imports a module of the benchmark, which is not installed."""
    monkeypatch.syspath_prepend(str(FOLDER.parent.parent))
    return lambda name: importlib.import_module(f"benchmarks.quality.{name}")


def batch_of(rng, count=12):
    return rng.normal((1, -2, 5), (1, 3, 0.5), (count, 3)).astype("float32")


LABELS = np.repeat(np.arange(5), (30, 40, 25, 35, 20))


@pytest.mark.parametrize(
    ("regime", "classes"), [("one_class", 1), ("two_classes", 2)]
)
def test_minibatches_hold_that_many_classes(regime, classes, quality, rng):
    rows = quality("batches").draw(regime, LABELS, 300, rng)
    assert rows.shape == (300, 16)
    counts = [
        sorted(np.unique(LABELS[batch], return_counts=True)[1])
        for batch in rows
    ]
    assert counts == [[16 // classes] * classes] * 300
    # Over the run all classes are seen about equally often.
    seen = np.bincount(LABELS[rows].reshape(-1)) / rows.size
    np.testing.assert_allclose(seen, 0.2, atol=0.06)


def test_sorted_minibatches_go_through_the_classes(quality, rng):
    rows = quality("batches").draw("sorted", LABELS, 20, rng)
    flat = rows.reshape(-1)
    assert sorted(flat[:150]) == list(range(150))  # an epoch, each row once
    labels = LABELS[flat[:150]]
    assert (np.diff(labels) >= 0).all()
    assert list(flat[:30]) != list(range(30))  # shuffled within a class
    assert (LABELS[flat[150:180]] == 0).all()  # and again from the first


def test_iid_minibatches_draw_from_everything(quality, rng):
    batches = quality("batches")
    for regime, size in (("iid_2", 2), ("fine_tuning_4", 4)):
        rows = batches.draw(regime, LABELS, 2_000, rng)
        assert rows.shape == (2_000, size)
        seen = np.bincount(LABELS[rows].reshape(-1)) / rows.size
        np.testing.assert_allclose(seen, np.bincount(LABELS) / 150, atol=0.03)


def test_an_unknown_regime_is_an_error(quality, rng):
    with raises(
        ValueError,
        "`regime` must be among iid_128, iid_64, iid_32, iid_16, iid_8, iid_4, "
        "iid_3, iid_2, iid_1, one_class, two_classes, sorted, fine_tuning_4, "
        "fine_tuning_2. Received: regime='three_classes'.",
    ):
        quality("batches").draw("three_classes", LABELS, 2, rng)


def test_tasks_keep_test_images_out_of_training(quality):
    tasks = quality("tasks")
    for name, shape in (("digits", (8, 8, 1)), ("cluttered", (10, 10, 1))):
        task, other = tasks.load(name, 0), tasks.load(name, 1)
        assert task.train.x.shape[1:] == task.test.x.shape[1:] == shape
        known = {image.tobytes() for image in task.train.x}
        assert not any(image.tobytes() in known for image in task.test.x)
        assert set(task.train.y) == set(task.test.y) == set(range(10))
        assert not np.array_equal(task.test.x, other.test.x)
        again = tasks.load.__globals__["_LOADERS"][name].__wrapped__(0)
        np.testing.assert_array_equal(task.shifted.x, again.shifted.x)


@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
def test_cifar10_comes_from_tensorflow_datasets(quality):
    import tensorflow_datasets as tfds

    tasks, training = quality("tasks"), quality("training")
    with tfds.testing.mock_data(num_examples=60):
        published, held_back = (
            tasks._LOADERS["cifar10"].__wrapped__(seed) for seed in (0, 1)
        )
        result = training.train(
            training.Run("cifar10", "one_class", "renorm", "sgd", 0.01, 20, 3)
        )
    assert [len(part.x) for part in published[:2]] == [60, 60]
    # Rates are tuned on training images that are held back.
    assert [len(part.x) for part in held_back[:2]] == [48, 12]
    known = {image.tobytes() for image in published.train.x}
    for part in held_back[:2]:
        assert part.x.shape[1:] == (32, 32, 3)
        assert 0 <= part.x.min() < part.x.max() <= 1
        assert known >= {image.tobytes() for image in part.x}
        known -= {image.tobytes() for image in part.x}
    assert len(result["curve"]) == 10
    assert result["accuracy"] == result["curve"][-1]


def test_shift_is_what_its_description_says(quality):
    task = quality("tasks").load("digits", 0)
    noise = task.shifted.x - (0.6 * task.test.x + 0.3)
    assert abs(noise.mean()) < 0.005
    assert noise.std() == pytest.approx(0.15, rel=0.02)
    np.testing.assert_array_equal(task.shifted.y, task.test.y)


def test_dense_networks_normalize_vectors(quality):
    training = quality("training")
    model = training.make_model("renorm", "digits_dense", 100)
    assert [
        layer.input.shape
        for layer in model.layers
        if isinstance(layer, BatchRenormalization)
    ] == [(None, 64), (None, 128), (None, 256)]


def test_variant_without_changes_is_the_layer(quality, rng):
    arguments = {"momentum": 0.8, "r_max": 1.5, "d_max": 1.0}
    variant = quality("variants").VariantRenormalization(**arguments)
    layer = BatchRenormalization(**arguments)
    for _ in range(4):
        batch = batch_of(rng)
        assert_close(
            variant(batch, training=True), layer(batch, training=True), 1e-6
        )
    for ours, theirs in zip(variant.weights, layer.weights, strict=True):
        assert ours.path.split("/")[-1] == theirs.path.split("/")[-1]
        assert_close(ours.numpy(), theirs.numpy(), 1e-6)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("moment", ["variance", "unbiased", "stddev"])
def test_variants_keep_their_moment(moment, debiased, quality, rng):
    layer = quality("variants").VariantRenormalization(
        moment=moment, debiased=debiased, momentum=0.7, epsilon=0.01
    )
    reference = Reference(3, momentum=0.7, epsilon=0.01)
    batches = [batch_of(rng) for _ in range(5)]
    weights = 0.3 * 0.7 ** np.arange(4, -1, -1.0)
    rest = 0.7**5  # what the initial values still weigh
    if debiased:
        weights, rest = weights / weights.sum(), 0.0
    for batch in batches:
        layer(batch, training=True)
    rows = np.stack(batches).astype("float64")
    mean = weights @ rows.mean(axis=1) + rest * reference.moving_mean
    if moment == "stddev":
        stddev = weights @ np.sqrt(rows.var(axis=1) + 0.01)
        variance = (stddev + rest * np.sqrt(1.01)) ** 2 - 0.01
    else:
        ddof = int(moment == "unbiased")
        variance = weights @ rows.var(axis=1, ddof=ddof) + rest
    assert_close(layer.moving_mean.numpy(), mean, 1e-5)
    assert_close(layer.moving_variance.numpy(), variance, 1e-5)


def test_adaptive_limits_follow_the_clipped_share(quality):
    layer = quality("variants").AdaptiveRenormalization(
        share=0.25, opening_steps=10, momentum=1.0
    )
    # Against moving statistics 0 and 1: all of d's channels are clipped, none
    # of r's.
    batch = np.array([[5.0, -5.0], [7.0, -7.0]], "float32")
    layer(batch, training=True)
    assert layer.current_limits() == pytest.approx((1.0, 0.5))
    layer(batch, training=False)
    assert layer.current_limits() == pytest.approx((1.0, 0.5))
    # Nothing is clipped: the limits close, a third as fast, and stop.
    layer(np.array([[1.0, 1.0], [-1.0, -1.0]], "float32"), training=True)
    assert layer.current_limits() == pytest.approx((1.0, 0.5 - 0.5 / 3))
    for _ in range(5):
        layer(np.array([[1.0, 1.0], [-1.0, -1.0]], "float32"), training=True)
    assert layer.current_limits() == pytest.approx((1.0, 0.0))


def test_targets_of_the_layer_as_it_comes(quality):
    report, cell = quality("report"), quality("experiments").Cell
    figures = {
        cell("cluttered", regime, contender): {"mean": mean, "spread": 0.01}
        for regime, contender, mean in (
            *(("iid_2", "gated", 0.82), ("iid_2", "bn", 0.831)),
            *(("iid_4", "gated", 0.9), ("iid_4", "bn", 0.903)),
            *(("iid_8", "gated", 0.9), ("iid_8", "renorm", 0.905)),
            *(("sorted", "gated", 0.1), ("sorted", "bn", 0.11)),
            *(("one_class", "gated", 0.874), ("one_class", "bn", 0.3)),
        )
    }
    found = report._targets_as_it_comes({"regimes_cluttered": figures})
    assert [
        (each["target"].split(": as it comes, ")[1], each["reached"])
        for each in found
    ] == [
        ("not below batch normalization by more than its spread", False),
        ("reaches 0.82", True),
        ("not below batch normalization by more than its spread", True),
        ("at most 0.004 below batch normalization", True),
        ("not below renorm., Algorithm 1 by more than its spread", True),
        ("at most 0.004 below renorm., Algorithm 1", False),
        ("not below batch normalization by more than its spread", True),
        ("at most 0.01 below batch normalization", True),
        ("not below batch normalization by more than its spread", True),
        ("reaches 0.875", False),
    ]


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_rates_of_the_rest_are_scaled(name, quality):
    rng = np.random.default_rng(4)
    values = {"conv2d_kernel": rng.normal(size=(2, 3)), "beta": [1.0, 2.0]}
    gradients = [
        [
            rng.normal(size=np.shape(value)).astype("float32")
            for value in values.values()
        ]
        for _ in range(3)
    ]

    def trained(optimizer):
        variables = [
            keras.Variable(value, dtype="float32", name=name)
            for name, value in values.items()
        ]
        for step in gradients:
            optimizer.apply(step, variables)
        return [variable.numpy() for variable in variables]

    ours = trained(getattr(quality("rest"), name)(0.01, rest=10.0))
    plain = getattr(keras.optimizers, name)
    assert_close(ours[0], trained(plain(0.01))[0], 1e-6)
    assert_close(ours[1], trained(plain(0.1))[1], 1e-6)


def test_every_optimizer_has_rates(quality):
    assert set(quality("experiments").RATES) == set(
        quality("training").OPTIMIZERS
    )


def test_rates_are_tuned_on_seeds_that_do_not_count(quality):
    experiments, training = quality("experiments"), quality("training")
    plan = experiments.Plan(seeds=10, tuning_seeds=1, steps=600)
    for task in (["digits"], ["digits", "cluttered"]):
        for experiment in experiments.experiments(task, quick=False):
            for cell in experiment.cells:
                tuning = plan.tuning(experiment.tuned_cell(cell))
                tuned = {run.seed for runs in tuning.values() for run in runs}
                counted = plan.evaluation(cell, 0.05)
                assert min(tuned) >= training.TUNING_SEED
                # Half as many where a training takes long.
                is_slow = cell.task in ("cluttered_residual", "segments")
                count = 5 if is_slow else 10
                assert [run.seed for run in counted] == list(range(count))
                assert len({run.steps for run in counted}) == 1
                assert {
                    run.steps for runs in tuning.values() for run in runs
                } == {counted[0].steps}


def test_the_layer_as_it_comes_meets_its_rivals_everywhere(quality):
    by_place = {}
    for experiment in quality("experiments").experiments(
        ["digits", "cluttered"], quick=False
    ):
        if experiment.tuned_as is None:
            for cell in experiment.cells:
                # Why Adam is worse was asked of two contenders alone.
                if "rest" not in cell.optimizer and "eps" not in cell.optimizer:
                    place = cell.task, cell.regime, cell.optimizer
                    by_place.setdefault(place, set()).add(cell.contender)
    rivals = {"gated", "bn", "renorm", "renorm_corrected", "group"}
    for place, contenders in by_place.items():
        assert rivals <= contenders, place
        assert "keras_renorm" in contenders or place[2] == "adam", place
    regimes = set(quality("batches").REGIMES)
    for task in ("digits", "cluttered"):
        found = {place[1] for place in by_place if place[0] == task}
        assert found | {"fine_tuning_4", "fine_tuning_2"} == regimes


def test_what_measures_and_what_does_not(quality):
    contenders = quality("contenders").CONTENDERS
    momenta = {
        name: contender.layer(600).gradient_momentum
        for name, contender in contenders.items()
        if isinstance(contender.layer(600), BatchRenormalization)
    }
    assert momenta.pop("gated") == 0.9
    assert contenders["gated"].scheduler is None  # which would give limits
    assert momenta.pop("renorm_corrected") == 0.9
    assert momenta.pop("renorm_corrected_adapted") == 0.9
    assert set(momenta.values()) == {None}


def run_benchmark(*arguments, how=("-m", "benchmarks.quality")):
    root = str(FOLDER.parent.parent)
    return subprocess.run(
        [sys.executable, *how, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": root},
    )


def test_a_run_resumes_and_repeats(tmp_path):
    arguments = (
        "--quick",
        "--steps",
        60,
        "--only",
        "limits_digits",
        "--jobs",
        2,
    )
    first = run_benchmark(*arguments, "--output", tmp_path)
    assert first.returncode == 0, first.stderr
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    # Four rates, two seeds each; two contenders, two seeds each.
    assert len(runs) == 12
    summary = json.loads((tmp_path / "summary.json").read_text())
    cells = summary["experiments"]["limits_digits"]["cells"]
    for cell in cells:
        found = [
            run["accuracy"]
            for run in runs
            if run["contender"] == cell["contender"] and run["seed"] < 1_000
        ]
        assert sorted(found) == sorted(cell["values"])
        assert cell["mean"] == pytest.approx(np.mean(found))
        assert cell["spread"] == pytest.approx(np.std(found, ddof=1))
    assert "± " in (tmp_path / "tables.md").read_text()

    # What was stopped goes on: the last run is trained again, the others not.
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    again = run_benchmark(*arguments, "--output", tmp_path)
    assert again.returncode == 0, again.stderr
    resumed = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert resumed[:-1] == lines[:-1]
    last, expected = json.loads(resumed[-1]), json.loads(lines[-1])
    del last["seconds"], expected["seconds"]
    assert last == expected

    # And a figure repeats from the name that the summary gives.
    name = cells[0]["run"]
    single = run_benchmark("--run", name, how=(str(FOLDER),))
    assert single.returncode == 0, single.stderr
    assert json.loads(single.stdout)["accuracy"] == cells[0]["values"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 5), "--steps must be at least 60. Received: 5"),
        (("--seeds", 0), "--seeds must be at least 1. Received: 0"),
        (
            ("--only", "speed"),
            "--only must be among regimes_digits, fine_tuning_digits",
        ),
        (
            ("--run", "digits/iid_5/bn/sgd/0.1/60/0"),
            "regime must be among iid_128",
        ),
        (
            ("--quick", "--tasks", "digits", "cluttered"),
            "must be a single one with --quick. Received: digits cluttered.",
        ),
        (("--run", "digits/iid_2"), "--run must be task/regime/contender/"),
    ],
)
def test_bad_arguments_are_named(arguments, message, quality, capsys):
    main = quality("command")
    with pytest.raises(SystemExit):
        main.parse_arguments([str(argument) for argument in arguments])
    assert message in capsys.readouterr().err
