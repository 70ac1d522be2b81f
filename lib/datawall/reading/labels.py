"""Names as a reader should see them: those of `data/labels.csv`, any other as it is."""

import csv

from datawall.engine import paths

_LINES = (paths.PACKAGE_DATA / "labels.csv").read_text(encoding="utf-8").splitlines(keepends=True)
LABELS = dict(csv.reader(_LINES[1:]))  # below the head


def plain(text: str) -> str:
    """A text that matplotlib draws letter by letter: no part of it is a formula, and no legend hides it."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def drawn(name: str) -> str:
    """A name as a reader should see it in a figure."""
    return plain(label(name))


def label(name: str) -> str:
    """A name as a reader should see it; of a model named `module:Class`, the class."""
    return LABELS.get(name, name.rpartition(":")[2])
