"""The driver of benchmarks/real, with a job that trains nothing."""

import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
WORKERS = "benchmarks.quality.workers"
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "real").exists(), reason="without the benchmarks"
)

# The loss is smallest at a rate of 0.1, for seeds of the tuning; at 1 it
# diverges. What a seed adds is known.
JOB = """
TITLE = "A tiny job"
MEASURES = {"loss": ("loss", "low"), "score": ("score", "high")}
SETTINGS = {"few": "few", "many": "many"}
CONTENDERS = {"a": "the first", "b": "the second"}
RATES = {"a": (1.0, 0.1, 0.01), "b": (0.5,)}
SEEDS = 6
STEPS, QUICK_STEPS = 7, 2
NEEDS = "NEEDED"

def train(setting, contender, rate, seed, is_tuning):
    assert is_tuning == (seed >= 1000)
    loss = {1.0: float("nan"), 0.1: 1.0, 0.01: 2.0, 0.5: 3.0}[rate]
    return {"loss": loss + 0.25 * (seed % 1000), "score": STEPS, "extra": [1]}

def draw(folder):
    (folder / "drawn.txt").write_text("drawn")
"""


@pytest.fixture
def run(tmp_path):
    """Runs the driver, in whose folders there is one job more."""
    folder = tmp_path / "more" / "benchmarks" / "real"
    folder.mkdir(parents=True)

    def run(*arguments, needed="numpy"):
        job = JOB.replace("NEEDED", needed)
        (folder / "tiny.py").write_text(job)
        path = os.pathsep.join(map(str, (ROOT, folder.parents[1])))
        return subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.real", "--jobs", "tiny"),
                *("--output", str(tmp_path), *arguments),
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
        )

    return run


def test_a_job_chooses_rates_counts_seeds_and_resumes(run, tmp_path):
    done = run()
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "tiny.jsonl").read_text().splitlines()
    trained = [json.loads(line) for line in lines]
    # A setting: three rates of the first, and six seeds of each; more than one
    # worker trains before it is renewed.
    assert len(trained) == 2 * (3 + 6 + 6)
    assert {entry["steps"] for entry in trained} == {7}
    assert all("numpy" in entry["machine"] for entry in trained)
    summary = json.loads((tmp_path / "tiny.json").read_text())
    cells = {
        (cell["setting"], cell["contender"]): cell for cell in summary["cells"]
    }
    assert set(cells) == {(s, c) for s in ("few", "many") for c in "ab"}
    for (_, contender), cell in cells.items():
        values = np.arange(1.0, 2.5, 0.25) + (2 if contender == "b" else 0)
        assert cell["rate"] == (0.1 if contender == "a" else 0.5)
        assert cell["values"]["loss"] == values.tolist()
        assert cell["mean"]["loss"] == pytest.approx(values.mean())
        assert cell["spread"]["loss"] == pytest.approx(values.std(ddof=1))
    table = (tmp_path / "tiny.md").read_text()
    best = "| the first | **1.625 ± 0.468** | **1.625 ± 0.468** |"
    assert best in table
    assert "| the second | 3.625 ± 0.468 | 3.625 ± 0.468 |" in table
    assert "| the first | 0.1 | 0.1 |" in table  # the rates
    assert (tmp_path / "tiny.png").stat().st_size > 0
    assert (tmp_path / "drawn.txt").exists()

    # What was stopped goes on: the last is trained again, the others not.
    (tmp_path / "tiny.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    partly = run("--no-training")
    assert partly.returncode == 0, partly.stderr
    cells = json.loads((tmp_path / "tiny.json").read_text())["cells"]
    assert len(cells) == 3
    assert run().returncode == 0
    resumed = (tmp_path / "tiny.jsonl").read_text().splitlines()
    assert resumed[:-1] == lines[:-1]
    assert json.loads(resumed[-1])["loss"] == trained[-1]["loss"]


def test_quick_is_one_setting_one_seed_and_few_steps(run, tmp_path):
    done = run("--quick")
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "tiny.json").read_text())["cells"]
    assert [
        (cell["setting"], cell["rate"], cell["seeds"], cell["mean"]["score"])
        for cell in cells
    ] == [("few", 1.0, 1, 2), ("few", 0.5, 1, 2)]


def test_bad_arguments_are_named(run):
    done = run(needed="numpy no-such-package")
    assert done.returncode == 2
    assert (
        "--jobs tiny needs packages that are not installed: pip install "
        "no-such-package"
    ) in done.stderr
    assert ("--settings must be among few, many. Received: none.") in run(
        "--settings", "none"
    ).stderr
    assert "--seeds must be at least 1. Received: 0." in run("--seeds=0").stderr


@pytest.fixture
def job(monkeypatch):
    """Imports a job, without the data that it needs."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.real.{name}")


@pytest.mark.parametrize(("best", "rate"), [("high", 0.1), ("low", 0.3)])
def test_the_first_measure_chooses_the_rate(best, rate, job, tmp_path):
    jobs, workers = job("jobs"), importlib.import_module(WORKERS)
    found = types.SimpleNamespace(
        MEASURES={"first": ("first", best), "second": ("second", best)},
        RATES=(0.1, 0.2, 0.3, 0.4),
        SEEDS=1,
        STEPS=5,
    )
    plan = jobs.Plan("toy", found)
    results = workers.Results(tmp_path / "toy.jsonl", jobs.Run)
    for value, runs in zip(
        (4.0, 3.0, 2.0, np.nan), plan.tuning(("a", "b")).values(), strict=True
    ):
        assert plan.best_rate(("a", "b"), results) is None
        for run in runs:
            results.add(run, {"first": value, "second": 1 / value})
    assert plan.best_rate(("a", "b"), results) == rate


@pytest.mark.tensorflow
def test_series_of_unequal_length_are_padded_and_masked(
    job, monkeypatch, tmp_path
):
    series = job("series")
    folder = tmp_path / "datasets" / "data" / "Toy"
    folder.mkdir(parents=True)
    head = "# 1,2:a\n@equalLength false\n@data\n"
    for part, rows in (
        ("TRAIN", ["1,3:5,5:b", "5:8:a"]),
        ("TEST", ["3,3,5:6,6,6:b"]),
    ):
        text = head + "\n".join(rows) + "\n"
        (folder / f"Toy_{part}.ts").write_text(text)
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path)]})
    monkeypatch.setattr(series.importlib.util, "find_spec", lambda name: spec)
    train, test = series.load.__wrapped__("Toy")
    # Of the three steps of training: mean 3 and 6, variance 8 / 3 and 2.
    deviation = np.sqrt([8 / 3, 2])
    expected = np.array([[[-2, -1], [0, -1], [0, 0]], [[2, 2], [0, 0], [0, 0]]])
    np.testing.assert_allclose(train.x, expected / deviation, atol=1e-6)
    np.testing.assert_allclose(
        test.x[0], [[0, 0], [0, 0], [2, 0]] / deviation, atol=1e-6
    )
    assert (train.y.tolist(), test.y.tolist()) == ([1, 0], [1])

    # What is padded changes nothing, in training neither.
    model = series.make("fcn", (3, 2), 2, "ours", has_mask=True)
    longer = np.pad(train.x, ((0, 0), (0, 4), (0, 0)))
    wide = series.make("fcn", (7, 2), 2, "ours", has_mask=True)
    wide.set_weights(model.get_weights())
    for training in (True, False):
        np.testing.assert_allclose(
            model(train.x, training=training),
            wide(longer, training=training),
            atol=1e-4,
        )


@pytest.mark.tensorflow
def test_auc_counts_pairs_in_the_right_order(job):
    stream = job("stream")
    logits, labels = np.array([0.0, 1.0, 1.0, 2.0]), np.array([0, 1, 0, 1])
    assert stream._auc(logits, labels) == (1 + 0.5 + 1 + 1) / 4
    logits = np.array([3.0, -2.0])
    expected = -np.log([1 / (1 + np.exp(-3)), 1 / (1 + np.exp(-2))]).mean()
    assert stream._loss(logits, np.array([1, 0])) == pytest.approx(expected)
