"""README and docs: their code runs, and their figures are the results'."""

import importlib.util
import json
import operator
import re
from pathlib import Path

import pytest

import keras_renorm
from keras_renorm._step import gating
from keras_renorm._step.gradient import HALF_WEIGHT_AGREEMENT, HIGHEST_WEIGHT
from tests import helpers

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "documents.py"
pytestmark = pytest.mark.skipif(
    not SCRIPT.exists(), reason="without the documents"
)
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    return re.findall(
        r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )


def test_readme_fits_on_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def run(page):
    names = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page), start=1):
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), names)


@pytest.mark.tensorflow
@pytest.mark.parametrize(
    "page", [page for page in PAGES[1:] if blocks(page)], ids=name_of
)
def test_code_runs_as_it_stands(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # for the files that it saves
    run(page)


@pytest.mark.tensorflow
def test_readme_prints_what_it_shows(capsys):
    page = PAGES[0]
    (shown,) = re.findall(
        r"^```text\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )
    run(page)
    printed = capsys.readouterr().out
    # Numbers, and which layer comes first, are of a processor and a version;
    # the cause, the remedy and what they claim are not.
    for text in (printed, shown):
        cause = re.search(r"^1\. .+", text, re.MULTILINE)[0]
        assert cause == "1. Batches not i.i.d."
        assert "   Remedy: Shuffle the data" in text
        _, of_layers = text.split("\nlayer  ")
        assert {"norm1", "norm2"} <= set(of_layers.split())
        *_, meanings = of_layers.partition("\nr, d: ")
        assert meanings in printed
        ours, theirs = map(float, re.findall(r"test accuracy (\S+)", text))
        assert ours > 0.85
        assert theirs < 0.5
        training, inference = map(
            float,
            re.search(
                r"accuracy: (\S+) in training mode, (\S+)", text
            ).groups(),
        )
        assert inference < training - 0.1


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("https://", "#")):
            path = page.parent / target.split("#")[0]
            assert path.exists(), target


def test_every_public_name_has_its_place_in_the_api():
    page = ROOT / "docs" / "api.md"
    shown = re.findall(
        r"^::: keras_renorm\.(\S+)$", page.read_text(), re.MULTILINE
    )
    expected = [
        name
        for name in keras_renorm.__all__
        if name not in ("callbacks", "diagnostics", "schedules")
    ]
    for package in ("callbacks", "diagnostics"):
        names = getattr(keras_renorm, package).__all__
        expected += [f"{package}.{name}" for name in names]
    assert set(expected) <= set(shown)
    for name in shown:
        assert operator.attrgetter(name)(keras_renorm) is not None


def test_every_page_and_tutorial_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = re.findall(
        r"^ +- (?:.+: )?(\S+\.(?:md|ipynb))$", menu, re.MULTILINE
    )
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]]
    tutorials = ROOT.glob("tutorials/[0-9]*.py")
    pages += [f"tutorials/{path.stem}.ipynb" for path in tutorials]
    assert sorted(listed) == sorted(pages)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TUTORIALS = load(ROOT / "docs" / "execute_tutorials.py")


@pytest.mark.parametrize("name", TUTORIALS.names())
def test_a_notebook_has_the_cells_of_its_tutorial(name):
    """Else: `python docs/execute_tutorials.py NAME`."""
    path = ROOT / "docs" / "tutorials" / f"{name}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    shown = [
        (cell["cell_type"] == "code", cell["source"])
        for cell in notebook["cells"]
    ]
    assert shown == TUTORIALS.cells_of(TUTORIALS.script_of(name))
    assert any(cell.get("outputs") for cell in notebook["cells"])


@pytest.mark.parametrize("name", TUTORIALS.names())
def test_a_tutorial_is_short(name):
    assert len(TUTORIALS.script_of(name).splitlines()) <= 250


def test_notebooks_are_small():
    paths = list((ROOT / "docs" / "tutorials").glob("*.ipynb"))
    assert len(paths) == len(TUTORIALS.names())
    assert sum(path.stat().st_size for path in paths) < 4_000_000


@pytest.fixture(scope="module")
def documents():
    """The script that writes what documents take from results."""
    return load(SCRIPT)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_tables_are_those_of_the_results(page, documents):
    text = page.read_text()
    named = re.findall(r"^<!-- results: (.+?) -->$", text, re.MULTILINE)
    assert set(named) <= set(documents.PARTS)
    assert text.count("<!-- end -->") == len(named)
    assert documents.written(text) == text, "run benchmarks/documents.py"


def test_a_regime_without_a_label_is_an_error(documents, monkeypatch):
    monkeypatch.delitem(documents.REGIMES, "iid_2")
    with helpers.raises(
        ValueError,
        "`REGIMES` must have a label for every regime of the results. "
        "Received: results of ['iid_2'].",
    ):
        documents.PARTS["cluttered"]()


def test_every_table_is_in_a_document(documents):
    texts = "".join(page.read_text() for page in PAGES)
    for name in documents.PARTS:
        assert f"<!-- results: {name} -->" in texts


def test_pictures_are_those_of_the_results(documents):
    image = pytest.importorskip("PIL.Image")
    for name, (values, _) in documents.DRAWINGS.items():
        with image.open(documents.PICTURES / f"{name}.png") as picture:
            shown = json.loads(picture.text["Description"])
        assert shown == values(), "run benchmarks/documents.py"


def test_the_picture_is_of_ten_seeds(documents):
    assert "the mean over ten seeds" in PAGES[0].read_text()
    for task in documents.DRAWN_TASKS:
        for cell in experiments()[f"regimes_{task}"]["cells"]:
            if cell["contender"] in documents.DRAWN:
                assert len(cell["values"]) == 10


def experiments():
    path = ROOT / "benchmarks/results/quality/summary.json"
    return json.loads(path.read_text())["experiments"]


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "benchmarks/quality/README.md"], ids=name_of
)
def test_means_in_prose_are_those_of_the_results(page):
    known = {
        f"{cell['mean']:.3f} ± {cell['spread']:.3f}"
        for found in experiments().values()
        for cell in found["cells"]
    } | {
        f"{mean:.3f} ± {cell['spread'][name]:.3f}"
        for path in (ROOT / "benchmarks/results/real").glob("*.json")
        for cell in json.loads(path.read_text())["cells"]
        for name, mean in cell["mean"].items()
    }
    stated = re.findall(r"-?\b0\.\d{3} ± 0\.\d{3}\b", page.read_text())
    assert set(stated) <= known, set(stated) - known


def test_formulas_have_the_numbers_of_the_code():
    text = (ROOT / "docs/design.md").read_text()
    assert f"H(worth, {gating.HALF_OPEN_WORTH:g}))" in text
    examples = f"H(n worth, {gating.HALF_OPEN_EXAMPLES:g})"
    assert f"{examples} H(worth, {gating.LEAST_WORTH:g})))" in text
    persists = f"H(persistence, {gating.HALF_SHUT_PERSISTENCE:g})"
    assert f"{persists} (1 - H(1 / n, {gating.HALF_OPEN_WORTH:g})))" in (
        text.replace("−", "-")
    )
    assert f"Below {gating.LEAST_OPENING:g}, g is 0" in text
    raised = f"{gating.STEEPNESS:g}".translate(
        str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
    )
    assert f"H(x, h) = x{raised} / (x{raised} + h{raised})" in text
    for momentum in (0.99, 0.995):
        n = round(1 / (1 - momentum))
        ramp, _ = keras_renorm.schedules.default_limits(momentum)
        begin, end = ramp.begin_step // n, ramp.end_step // n
        assert re.search(rf"\b{begin} n\b.*?\b{end} n\b", text, re.DOTALL)


def test_the_design_says_how_much_of_the_gradient_is_corrected():
    square = f"{HALF_WEIGHT_AGREEMENT:g}²"
    formula = f"{HIGHEST_WEIGHT:g} g a² / (a² + {square})"
    assert formula in (ROOT / "docs/design.md").read_text()
