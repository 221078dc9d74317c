"""The package's docstrings, as mkdocstrings reads them.

They are in Keras's style: under "Example:" nothing is indented, and "Call
arguments:" has no counterpart in Google's.
"""

import re
import textwrap

import griffe

INDENT = "    "
HEADING = r"^[A-Z]\w*( \w+)*:$"


def in_google_style(text):
    """A docstring with Google's headings."""
    text = re.sub(
        r"^Call arguments:$",
        "Other Parameters: Call arguments",
        text,
        flags=re.MULTILINE,
    )
    return re.sub(
        rf"^Example:\n\n(.*?)(?={HEADING}|\Z)",
        lambda match: f"Examples:\n{textwrap.indent(match[1], INDENT)}",
        text,
        flags=re.MULTILINE | re.DOTALL,
    )


class KerasStyle(griffe.Extension):
    """Reads docstrings of Keras's style."""

    def on_object(self, *, obj, **arguments):
        """Called for each module, class and function that is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = in_google_style(obj.docstring.value)
