"""A page for each tutorial, made of its script when the site is built."""

from pathlib import Path

from mkdocs.structure.files import File

TUTORIALS = Path(__file__).parent.parent / "tutorials"


def on_files(files, config):
    """Called by MkDocs with the files of the site; adds the pages."""
    for path in sorted(TUTORIALS.glob("[0-9]*.py")):
        files.append(
            File.generated(
                config,
                f"tutorials/{path.stem}.md",
                content=page_of(path.read_text(encoding="utf-8")),
            )
        )
    return files


def page_of(script):
    """Prose and code of a script in cells, as Markdown."""
    parts = []
    for cell in script.split("# %%")[1:]:
        head, _, body = cell.partition("\n")
        if "[markdown]" in head:
            lines = (line.removeprefix("#") for line in body.splitlines())
            parts.append("\n".join(line.removeprefix(" ") for line in lines))
        elif body.strip():
            parts.append(f"```python\n{body.strip()}\n```")
    return "\n\n".join(part.strip() for part in parts) + "\n"
