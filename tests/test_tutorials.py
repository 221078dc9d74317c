"""The tutorials' switches that need a network, on mocked data.

What the tutorials claim they assert themselves; CI runs them.
"""

import json
import runpy
from pathlib import Path
from unittest import mock

import keras
import numpy as np
import pytest
from keras import layers

import keras_renorm
from keras_renorm.diagnostics import ActivationNoise
from keras_renorm.schedules import LinearRamp

pytestmark = pytest.mark.slow
TUTORIALS = Path(__file__).parent.parent / "tutorials"


@pytest.fixture(autouse=True)
def modules_beside_the_tutorials(monkeypatch):
    """As Python does for a script that it starts."""
    monkeypatch.syspath_prepend(str(TUTORIALS))


@pytest.mark.tensorflow
def test_quickstart_trains_in_minibatches_of_one_class(monkeypatch, tmp_path):
    options = ["--seeds", "1", "--steps", "15", "--output", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["quickstart", *options])
    names = runpy.run_path(str(TUTORIALS / "01_quickstart.py"))
    rows = names["one_class_batches"](np.random.default_rng(1))
    assert rows.shape == (15, names["BATCH_SIZE"])
    assert all(len(set(names["y_train"][batch])) == 1 for batch in rows)
    for name in ("quickstart.png", "plain.keras"):
        assert (tmp_path / name).stat().st_size > 0


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
@pytest.mark.parametrize(
    ("data", "examples"), [("cats_vs_dogs", 60), ("stanford_dogs", 1_000)]
)
def test_fine_tuning_runs_on_photographs(data, examples, monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    options = ["--data", data, "--weights", "none", "--seeds", "1"]
    monkeypatch.setattr(
        "sys.argv",
        ["tune", *options, "--steps", "2", "--output", str(tmp_path)],
    )

    def small_network(input_shape, include_top, pooling, weights):
        assert (include_top, pooling, weights) == (False, "avg", None)
        return keras.Sequential(
            [
                keras.Input(input_shape),
                keras.layers.Conv2D(4, 3, strides=4),
                keras.layers.BatchNormalization(),
                keras.layers.GlobalAveragePooling2D(),
            ]
        )

    monkeypatch.setattr(keras.applications, "MobileNetV2", small_network)
    with tfds.testing.mock_data(num_examples=examples):
        names = runpy.run_path(str(TUTORIALS / "04_fine_tuning.py"))
    images, labels = names["x_new"], names["y_new"]
    assert images.shape == (len(labels), 96, 96, 3)
    assert -1 <= images.min() < 0 < images.max() <= 1
    assert 0 < len(labels) <= examples
    assert labels.max() < 5  # of 120 breeds
    for batch in names["one_class_batches"](
        np.random.default_rng(0), names["rows_of_class"]
    ):
        assert len(set(labels[batch])) == 1
    assert (tmp_path / "fine_tuning.png").stat().st_size > 0


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
def test_small_batches_and_export_run_on_mnist(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    options = ["--data", "mnist", "--seeds", "1", "--steps", "4"]
    monkeypatch.setattr(
        "sys.argv", ["export", *options, "--output", str(tmp_path)]
    )
    with tfds.testing.mock_data(num_examples=200):
        names = runpy.run_path(
            str(TUTORIALS / "06_small_batches_and_export.py")
        )
    assert names["x"].shape == (200, 28, 28, 1)
    assert set(names["y_new"]) == set(range(5))
    assert {runtime for runtime, _ in names["differences"]} >= {
        "tf_saved_model",
        "onnx",
    }
    assert (tmp_path / "small_batches_and_export.png").stat().st_size > 0


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
def test_why_does_it_evaluate_badly_runs_on_mnist(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    options = ["--data", "mnist", "--seeds", "1", "--steps", "2"]
    monkeypatch.setattr(
        "sys.argv", ["evaluate", *options, "--output", str(tmp_path)]
    )
    with tfds.testing.mock_data(num_examples=120):
        names = runpy.run_path(
            str(TUTORIALS / "07_why_does_it_evaluate_badly.py")
        )
    assert names["x_train"].shape == names["x_val"].shape == (120, 28, 28, 1)
    assert len(names["outcomes"]) == 5
    # What does not hang on how long it was trained.
    (outcome,) = names["outcomes"]["trainable weights only"]
    causes = [verdict.cause for verdict in outcome.report.verdicts]
    assert causes[0] == "statistics never trained"
    (outcome,) = names["outcomes"]["two images a batch"]
    assert {layer.examples for layer in outcome.report.layers} == {2}
    (outcome,) = names["outcomes"]["darker, noisy images"]
    assert len(outcome.report.layers) == 4
    rows = names["one_class"](np.random.default_rng(1), 16, 15)
    assert rows.shape == (15, 16)
    assert all(len(set(names["y_train"][batch])) == 1 for batch in rows)
    for picture in ("report", "why_does_it_evaluate_badly"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 0


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
@pytest.mark.parametrize(
    ("data", "examples", "loaded"),
    [  # of many classes ten are kept
        (
            "cats_vs_dogs",
            30,
            {("cats_vs_dogs", "train[:80%]"), ("cats_vs_dogs", "train[80%:]")},
        ),
        (
            "stanford_dogs",
            200,
            {("stanford_dogs", "train"), ("stanford_dogs", "test")},
        ),
        (
            "domainnet",
            400,
            {
                ("domainnet/clipart", "train"),
                ("domainnet/clipart", "test"),
                ("domainnet/sketch", "train"),
                ("domainnet/sketch", "test"),
            },
        ),
    ],
)
def test_domain_adaptation_runs_on_photographs(
    data, examples, loaded, monkeypatch, tmp_path
):
    import tensorflow_datasets as tfds

    options = ["--data", data, "--seeds", "1", "--steps", "2"]
    monkeypatch.setattr(
        "sys.argv", ["domains", *options, "--output", str(tmp_path)]
    )
    with (
        tfds.testing.mock_data(num_examples=examples),
        mock.patch.object(tfds, "load", wraps=tfds.load) as load,
    ):
        names = runpy.run_path(str(TUTORIALS / "05_domain_adaptation.py"))
    calls = load.call_args_list
    assert {(call.args[0], call.kwargs["split"]) for call in calls} == loaded
    source, target = names["DOMAINS"][data]
    for images, labels in names["data"].values():
        assert images.dtype == "uint8"
        assert images.shape == (len(labels), 64, 64, 3)
        assert 0 < len(labels) < examples
        assert labels.max() < 10
    if data != "domainnet":  # of a class, a domain has one half
        counts = [
            np.bincount(names["data"][domain, "train"][1], minlength=10)
            for domain in (source, target)
        ]
        assert np.all(np.abs(counts[0] - counts[1]) <= 1)
        brown, black = (
            {image.tobytes() for image in names["data"][domain, "train"][0]}
            for domain in (source, target)
        )
        assert not brown & black
    banks = [
        dict(np.load(tmp_path / f"{each}.npz")) for each in (source, target)
    ]
    assert banks[0].keys() == banks[1].keys()
    assert any(np.any(banks[0][key] != banks[1][key]) for key in banks[0])
    assert (tmp_path / "domain_adaptation.png").stat().st_size > 0


@pytest.mark.tensorflow
def test_brown_and_black_are_told_apart_by_red_inside_the_box():
    import domains

    image = np.zeros((20, 40, 3), "uint8")
    image[:, 20:, 0] = 200
    for left, red in ((0.0, 0), (0.55, 200)):
        box = np.array([[0.0, left, 1.0, left + 0.45]], "float32")
        example = {"image": image, "label": 3, "objects": {"bbox": box}}
        _, label, redness = domains.shrink(example)
        assert (label, float(redness)) == (3, pytest.approx(red))
    halves = domains.in_redder_half(
        np.array([0, 0, 1, 1]), np.array([1.0, 2.0, 30.0, 20.0])
    )
    assert halves.tolist() == [False, True, True, False]


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
def test_colored_digits_share_no_digit_between_training_and_test(tmp_path):
    from colored_digits import ColoredDigits
    from sklearn.datasets import load_digits

    digits, truth = load_digits(return_X_y=True)
    rows = {}
    for domain in ColoredDigits.BUILDER_CONFIGS:
        builder = ColoredDigits(config=domain.name, data_dir=tmp_path)
        builder.download_and_prepare()
        for split in ("train", "test"):
            dataset = builder.as_dataset(split=split, as_supervised=True)
            images, labels = dataset.batch(2_000).get_single_element()
            # Back to the ink of a pixel, and to the digit nearest to it.
            image = images.numpy().reshape(-1, 8, 2, 8, 2, 3).mean((2, 4)) / 255
            paper = np.median(image[:, :, 0], axis=1)[:, None, None]
            ink = 1 - (image / paper).mean(-1).reshape(-1, 64)
            ink /= 1 - np.mean(np.array(domain.ink) / np.array(domain.paper))
            # |ink - digit|^2 less |ink|^2
            squares = (digits**2).sum(axis=-1) / 256
            found = (squares - 2 * ink @ digits.T / 16).argmin(axis=-1)
            np.testing.assert_array_equal(truth[found], labels.numpy())
            assert len(set(found)) == len(found)
            rows[domain.name, split] = set(found)
    test = rows["brown", "test"]
    assert len(test) == 449
    for (domain, split), found in rows.items():
        if split == "test":
            assert found == test, domain
        else:
            assert not found & test, domain
    assert not rows["brown", "train"] & rows["black", "train"]
    assert len(rows["brown", "train"] | rows["black", "train"] | test) == 1797


def count(model, kind):
    return sum(isinstance(layer, kind) for layer in model.layers)


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
def test_optimization_trains_the_networks_of_the_papers(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    options = "--scale full --seeds 1 --blocks 1 --batch-size 4 --steps 1"
    monkeypatch.setattr(
        "sys.argv",
        [
            "optimization",
            *options.split(),
            *("--points", "1", "--output", str(tmp_path)),
        ],
    )
    with tfds.testing.mock_data(num_examples=20):
        names = runpy.run_path(str(TUTORIALS / "08_optimization.py"))
    assert names["x_train"].shape == (20, 32, 32, 3)
    trained = {run[:3] for run in names["histories"]}
    assert trained == {
        *(("VGG", kind, 0.1) for kind in names["KINDS"]),
        *(
            ("ResNet", kind, rate)
            for kind in ("standard", "BN")
            for rate in (0.0001, 0.003, 0.1)
        ),
    }
    for picture in ("landscape", "optimization"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 0
    shares = 0.0, 0.49, 0.5, 0.74, 0.75, 1.0
    assert [names["papers"].decays(share) for share in shares] == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]
    x, _ = names["papers"].augmented(names["x_train"][:3], names["y_train"][:3])
    assert x.shape == (3, 32, 32, 3)

    # He et al. 2016, section 4.2: 6n + 2 layers, here n = 18.
    resnet = names["resnet"]("BN", 18, decay=5e-5)
    assert count(resnet, layers.Add) == 54
    assert count(resnet, layers.Conv2D) == 1 + 54 * 2
    assert count(resnet, layers.Dense) == 1
    assert count(resnet, layers.BatchNormalization) == 109
    assert [resnet.layers[-2].output.shape[-1], len(resnet.losses)] == [64, 109]
    weights = sum(np.prod(w.shape) for w in resnet.trainable_variables)
    assert 1_650_000 < weights < 1_750_000  # "1.7M"

    vgg = names["vgg"]("standard", names["papers"].FULL_VGG)
    assert count(vgg, layers.Conv2D) == 13
    assert count(vgg, layers.BatchNormalization) == 0
    noisy = names["vgg"]("noisy BN", names["papers"].FULL_VGG)
    assert count(noisy, ActivationNoise) == 13


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
def test_tuning_runs_on_mnist_and_goes_on(monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    def search(trials):
        options = ["--data", "mnist", "--steps", "10", "--seeds", "1"]
        options += ["--trials", str(trials), "--output", str(tmp_path)]
        storage = ["--storage", str(tmp_path / "study.db")]
        monkeypatch.setattr("sys.argv", ["tuning", *options, *storage])
        with tfds.testing.mock_data(num_examples=120):
            return runpy.run_path(str(TUTORIALS / "09_tuning.py"))

    names = search(2)
    assert names["x"].shape == (120, 28, 28, 1)
    parts = [names[f"x_{part}"] for part in ("train", "tune", "test")]
    assert [len(part) for part in parts] == [72, 24, 24]
    images = [image.tobytes() for part in parts for image in part]
    assert len(set(images)) == len(images)
    for _, labels in names["one_class_batches"](1).batch(10).take(1):
        assert labels.shape == (10, 16)
        assert all(len(set(batch)) == 1 for batch in labels.numpy())
    # The search begins with the default, so that it cannot end below it.
    first = names["study"].trials[0]
    assert first.params == names["PAPER"]
    scheduler = names["make_scheduler"](
        {"r_max": 2.0, "d_max": 4.0, "begin": 0.2, "length": 0.5}
    )
    assert str(scheduler.limits) == str(
        {
            "r_max": LinearRamp(1.0, 2.0, 2, 7),
            "d_max": LinearRamp(0.0, 4.0, 2, 7),
        }
    )
    assert (tmp_path / "tuning.png").stat().st_size > 0
    results = json.loads((tmp_path / "tuning.json").read_text())
    assert (results["trials"], len(results["sensitivity"])) == (2, 10)

    # A search that was stopped goes on: the trials that it has are kept.
    again = search(3)["study"].trials
    assert len(again) == 3
    assert [trial.params for trial in again[:2]] == [
        trial.params for trial in names["study"].trials[:2]
    ]


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # tensorflow-datasets' own
@pytest.mark.parametrize(
    ("data", "size", "large"), [("shapes", 32, "image"), ("pets", 64, "volume")]
)
def test_segmentation_runs(data, size, large, monkeypatch, tmp_path):
    import tensorflow_datasets as tfds

    options = ["--data", data, "--seeds", "1", "--steps", "2"]
    options += ["--large", large]
    monkeypatch.setattr(
        "sys.argv", ["segmentation", *options, "--output", str(tmp_path)]
    )
    with tfds.testing.mock_data(num_examples=12):
        names = runpy.run_path(str(TUTORIALS / "11_segmentation.py"))
    for part in ("", "_val"):
        images, classes = names[f"x{part}"], names[f"y{part}"]
        assert images.shape == (len(classes), size, size, 3)
        assert images.dtype == "float32"
        assert classes.shape == (len(images), size, size)
        assert set(np.unique(classes)) == {0, 1, 2}
    assert len(names["scores"]) == 7
    assert len(names["reports"]) == 6
    for (report,) in names["reports"].values():
        assert len(report.rows) == 10
        assert {layer.examples for layer in report.layers} == {2}
    # Reverted at the end: Keras's own.
    kinds = {
        type(layer)
        for layer in names["model"].layers
        if isinstance(layer, layers.BatchNormalization)
    }
    assert kinds == {layers.BatchNormalization}
    found, truth = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    iou = names["segmentation"].mean_iou(found, truth)
    assert iou == pytest.approx(5 / 18)
    image, mask = names["wanted"]
    assert image.shape == (*mask.shape, 1)
    assert set(np.unique(mask)) == {0, 1}
    # By tiles and at once, where batch normalization infers.
    (tiled, recalibrated) = names["in_tiles"]["renorm"]
    assert names["name"] == "renorm"
    at_once = names["served"].predict(image[None], verbose=0)[0]
    np.testing.assert_allclose(recalibrated, at_once, atol=1e-4)
    assert not np.allclose(tiled, recalibrated, atol=1e-4)
    assert names["mismatches"]["renorm"].largest == 0
    for picture in ("segmentation", "tiles"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 0


def test_a_real_image_is_read_where_its_package_is(monkeypatch, tmp_path):
    from PIL import Image

    package = tmp_path / "stardist"
    folder = package / "data" / "images"
    folder.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('not needed')")
    values = np.arange(32, dtype="uint16").reshape(4, 8)
    for name in ("img2d", "mask2d"):
        Image.fromarray(values).save(folder / f"{name}.tif")
    monkeypatch.syspath_prepend(str(tmp_path))
    import segmentation

    (image, mask), (image_val, mask_val) = segmentation.large("image")
    np.testing.assert_allclose(image[..., 0], values[:, :4] / 255, rtol=1e-6)
    np.testing.assert_allclose(image_val[..., 0], values[:, 4:] / 255, 1e-6)
    assert mask.sum() == 15
    assert mask_val.all()


@pytest.mark.tensorflow
@pytest.mark.filterwarnings("ignore")  # gymnasium's own
def test_reinforcement_learning_runs(monkeypatch, tmp_path):
    options = ["--seeds", "1", "--steps", "600", "--width", "8"]
    monkeypatch.setattr(
        "sys.argv", ["reinforcement", *options, "--output", str(tmp_path)]
    )
    names = runpy.run_path(str(TUTORIALS / "12_reinforcement_learning.py"))
    assert len(names["runs"]) == 4
    for ((episodes, _),) in names["runs"].values():
        assert episodes[:, 0].tolist() == [200, 400, 600]
        assert np.all((episodes[:, 1] > -2_000) & (episodes[:, 1] < 0))
    # Until the agents learn, they all act at random.
    firsts = [run[0][:2, 1] for (run,) in names["runs"].values()]
    assert np.all(np.array(firsts) == firsts[0])
    gaps = {name: run[1] for name, (run,) in names["runs"].items()}
    assert gaps["SAC, target networks"] == 0 < gaps["CrossQ, Keras BN"]
    assert (tmp_path / "returns.png").stat().st_size > 0


def numpy(values):
    return [keras.ops.convert_to_numpy(value) for value in values]


@pytest.mark.tensorflow
@pytest.mark.jax
@pytest.mark.parametrize(
    "normalization", [None, keras_renorm.BatchRenormalization]
)
def test_an_agent_learns_as_its_equations_say(normalization):
    import crossq

    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    now, then = rng.normal(3.0, 1.0, (2, 16, 5)).astype("float32")
    actions, noise = rng.uniform(-0.9, 0.9, (2, 16, 2)).astype("float32")
    rewards, goes_on = rng.normal(size=(2, 16, 1)).astype("float32")
    goes_on = (goes_on > 0).astype("float32")
    agent = crossq.Agent(5, 2, normalization, 1e-3, 8)

    # A density by the change of variables, in float64.
    mean, log_stddev = np.split(numpy([agent.actor(then)])[0], 2, axis=-1)
    raw = mean.astype("float64") + np.exp(log_stddev) * noise
    density = -((raw - mean) ** 2) / (2 * np.exp(2 * log_stddev)) - log_stddev
    density -= np.log(2 * np.pi) / 2 + np.log(1 - np.tanh(raw) ** 2)
    density = density.sum(axis=-1, keepdims=True)
    chosen, found = numpy(crossq.choose(agent.actor, then, noise))
    np.testing.assert_allclose(chosen, np.tanh(raw), rtol=1e-5)
    np.testing.assert_allclose(found, density, rtol=1e-4)

    # Critics that know two numbers, the targets' one lower.
    for lower, critics in ((0, agent.critics), (1, agent.targets)):
        if critics:
            kernel, bias = critics.layers[-1].weights
            kernel.assign(np.zeros(kernel.shape))
            bias.assign(np.array([[4.0], [2.5]]) - lower)
    after = 2.5 - (normalization is None) - density  # alpha is 1
    goal = rewards + 0.99 * goes_on * after
    loss = np.mean((np.array([4.0, 2.5]) - goal) ** 2)
    targets = numpy(agent.targets.variables) if agent.targets else []
    actor = numpy(agent.actor.variables)
    data = now, actions, rewards, then, goes_on, noise
    (value,) = numpy([agent.learn(*data)])
    assert value == pytest.approx(loss, rel=1e-4)
    for before, now_ in zip(actor, numpy(agent.actor.variables), strict=True):
        np.testing.assert_array_equal(before, now_)
    if agent.targets:
        for before, slow, fast in zip(
            targets,
            numpy(agent.targets.variables),
            numpy(agent.critics.variables),
            strict=True,
        ):
            expected = before + 0.005 * (fast - before)
            np.testing.assert_allclose(slow, expected, rtol=1e-4, atol=1e-7)
    else:  # one pass saw both halves
        layer = next(
            each for each in agent.critics.layers if hasattr(each, "step")
        )
        both = np.concatenate(
            [np.hstack([now, actions]), np.hstack([then, chosen])]
        )
        assert float(layer.step) == 1
        np.testing.assert_allclose(
            *numpy([layer.moving_mean, 0.01 * both.mean(axis=0)]), rtol=1e-3
        )
        # What it remembers of the gradient has moved, on JAX too.
        agent.learn(*data)
        assert np.any(numpy([layer.last_gradient])[0] != 0)

    critics = numpy(agent.critics.variables)
    agent.improve(now, noise)
    for before, after in zip(
        critics, numpy(agent.critics.variables), strict=True
    ):
        np.testing.assert_array_equal(before, after)
    assert any(
        np.any(before != after)
        for before, after in zip(
            actor, numpy(agent.actor.variables), strict=True
        )
    )
    # The policy is wider than its goal: its entropy counts less from now on.
    (moved,) = numpy([agent.log_alpha])
    assert moved == pytest.approx(-1e-3, rel=1e-2)
