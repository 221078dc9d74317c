"""Executes the tutorials and writes them, with what they print and draw.

    pip install -e ".[docs,tutorials,export]" jax
    python docs/execute_tutorials.py              # all; half an hour or more
    python docs/execute_tutorials.py 01_quickstart 04_fine_tuning

The site shows `docs/tutorials/*.ipynb` as they are and runs nothing. A test
(`tests/test_documents.py`) fails where a tutorial has changed and its notebook
has not. A change that changes no result needs no training:

    python docs/execute_tutorials.py --keep-outputs 01_quickstart
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "tutorials"
NOTEBOOKS = Path(__file__).parent / "tutorials"

_ADDRESSES = {"worker": ["127.0.0.1:23450", "127.0.0.1:23451"]}


def cells_of(script):
    """The cells of a script: `(is it code, text)`."""
    cells = []
    for cell in script.split("# %%")[1:]:
        head, _, body = cell.partition("\n")
        if "[markdown]" in head:
            lines = (line.removeprefix("#") for line in body.splitlines())
            text = "\n".join(line.removeprefix(" ") for line in lines)
            cells.append((False, text.strip()))
        elif body.strip():
            cells.append((True, body.strip()))
    return cells


def names():
    """Of all tutorials."""
    return [path.stem for path in sorted(SCRIPTS.glob("[0-9]*.py"))]


def script_of(name):
    """Its text."""
    return (SCRIPTS / f"{name}.py").read_text(encoding="utf-8")


def notebook_of(name):
    """A notebook of its cells, without outputs."""
    cells = [
        {
            "cell_type": "code" if is_code else "markdown",
            "id": f"cell-{at}",
            "metadata": {},
            "source": text,
            **({"execution_count": None, "outputs": []} if is_code else {}),
        }
        for at, (is_code, text) in enumerate(cells_of(script_of(name)))
    ]
    return {
        "cells": cells,
        "metadata": {
            "kernelspec": {
                "display_name": "Python 3",
                "language": "python",
                "name": "python3",
            },
            "language_info": {"name": "python"},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def partner_of(name):
    """Environment of the notebook, and command and environment of another.

    Two tutorials need two processes: the notebook is the first of them.
    """
    command = [sys.executable, str(SCRIPTS / f"{name}.py")]
    if name == "03_multi_worker":
        first, second = (
            {
                "TF_CONFIG": json.dumps(
                    {
                        "cluster": _ADDRESSES,
                        "task": {"type": "worker", "index": index},
                    }
                )
            }
            for index in (0, 1)
        )
        return first, command, second
    if name == "10_several_hosts_jax":
        command += ["--processes", "2", "--process", "1"]
        return {"LESSON_OPTIONS": "--processes 2 --process 0"}, command, {}
    return {}, None, {}


def execute(name):
    """Its notebook, executed in a folder of its own."""
    import nbclient
    import nbformat

    mine, command, others = partner_of(name)
    path = os.pathsep.join(map(str, (SCRIPTS, ROOT)))
    environment = {**os.environ, "PYTHONPATH": path}
    notebook = nbformat.from_dict(notebook_of(name))
    with tempfile.TemporaryDirectory() as folder:
        partner = command and subprocess.Popen(
            command,
            cwd=folder,
            env={**environment, **others},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            nbclient.NotebookClient(
                notebook, timeout=3600, resources={"metadata": {"path": folder}}
            ).execute(env={**environment, **mine})
        finally:
            if partner:
                partner.wait(timeout=600)
    return json.loads(nbformat.writes(notebook))


def outputs_of(cell):
    """What the site shows of a cell: words that were printed, and pictures."""
    shown = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream" and output["name"] == "stderr":
            continue
        if "text" in output:  # without the codes of colours
            output["text"] = re.sub(
                r"\x1b\[[0-9;]*m", "", "".join(output["text"])
            )
        output.pop("metadata", None)
        if "data" in output:
            output["metadata"] = {}
        shown.append(output)
    return shown


def kept(name):
    """Its cells with the outputs that its notebook has, in order."""
    old = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    notebook = notebook_of(name)
    code = [
        [cell for cell in each["cells"] if cell["cell_type"] == "code"]
        for each in (old, notebook)
    ]
    for before, cell in zip(*code, strict=True):
        cell["outputs"] = before["outputs"]
    return notebook


def write(name, notebook):
    """Writes it, without what changes from run to run."""
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        cell["source"] = "".join(cell["source"])  # a list of lines, or text
        if cell["cell_type"] == "code":
            cell["execution_count"] = None
            cell["outputs"] = outputs_of(cell)
    NOTEBOOKS.mkdir(exist_ok=True)
    path = NOTEBOOKS / f"{name}.ipynb"
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main():
    """Executes those that are named, or all."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", help="of tutorials")
    parser.add_argument("--keep-outputs", action="store_true")
    args = parser.parse_args()
    for name in args.names or names():
        how = kept if args.keep_outputs else execute
        write(name, how(name))
        print(name)


if __name__ == "__main__":
    main()
