"""Ontologies in OBO files: the terms of cell types, and what lies above each."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Ontology:
    """Terms of an OBO file that are not obsolete."""

    file: str
    identifiers: dict[str, str]  # by name
    parents: dict[str, list[str]]  # by identifier; some may be of other ontologies, and no terms here

    def ancestors(self, name: str) -> set[str]:
        """Identifiers of all that lies above a term; of the term too only where relations go round in a circle."""
        found: set[str] = set()
        waiting = [self.identifiers[name]]
        while waiting:
            above = set(self.parents.get(waiting.pop(), ())) - found
            found |= above
            waiting += above
        return found


def read(file: str | Path, *, relations: tuple[str, ...] = ("is_a", "relationship")) -> Ontology:
    """Read an OBO file, such as cl-basic.obo or cl-simple.obo of the Cell Ontology.

    `relations` are the tags that lead to a parent: `is_a`, and `relationship` for every other kind (part_of,
    develops_from, …). Raises FileNotFoundError, and ValueError if the file holds no terms or one without an identifier.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such ontology file; see https://obofoundry.org/ontology/cl for some.")
    word = {"is_a": 0, "relationship": 1}  # "is_a: parent ! comment", "relationship: kind parent ! comment"
    identifiers, parents = {}, {}
    text = Path(file).read_text(encoding="utf-8", errors="replace")
    for stanza in f"\n{text}".split("\n[Term]\n")[1:]:
        tags = [line.partition(": ")[::2] for line in stanza.partition("\n[")[0].splitlines()]
        term = dict(tags)
        if term.get("is_obsolete") == "true":
            continue
        if "id" not in term:
            raise ValueError(f"{file}: the term named {term.get('name')!r} has no id; the file is damaged.")
        identifiers[term.get("name", "")] = term["id"]
        parents[term["id"]] = [value.split()[word[tag]] for tag, value in tags if tag in relations]
    if not identifiers:
        raise ValueError(f"{file}: holds no [Term]; give an ontology in OBO format, such as cl-basic.obo.")
    return Ontology(str(file), identifiers, parents)
