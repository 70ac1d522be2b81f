"""What an independent check compares: `make notebooks` writes codecheck.yml and codecheck/manifest.csv.

The first is in CODECHECK's format, 2.0: every file that a reader sees, the cell that makes it, its hash. The second has
a line for each figure, table and printed fact stored in a notebook. A codechecker adds who checked, when, and a report.
"""

import base64
import hashlib
import re
from pathlib import Path

import nbformat
import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MANIFEST = ROOT / "codecheck" / "manifest.csv"
HOW = """\
One command checks all: `make test`, in a clone, on Linux with Python 3.12 and pip. It sets up .venv, fetches Kang's
cells (28 MB), makes the default study, executes every notebook, compares what its marked cells print with what is
stored, and runs all tests. `make notebooks` makes every file listed here again. On two cores: some minutes and a few
GB for .venv, then what README.md says under "What it costs". codecheck/manifest.csv lists every stored output and says
whether it is compared (True or False); within what, and why, CONTRIBUTING.md says under "Numbers across machines".
"""


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def code_cells(path):
    """Code cells of a notebook, each with the heading that it stands under."""
    section = ""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and (heading := re.search(r"^## (.+)", cell.source, re.M)):
            section = heading[1]
        elif cell.cell_type == "code":
            yield section, cell


def kind_and_content(output):
    """What a reader sees of an output, and its bytes; nothing of errors and progress bars."""
    if output.output_type == "stream":
        return "text", output.text.encode() if output.name == "stdout" else b""
    data = output.get("data", {})
    if "image/png" in data:
        return "figure", base64.b64decode(data["image/png"])
    return ("table", data["text/html"].encode()) if "text/html" in data else ("text", data["text/plain"].encode())


def outputs():
    """A row for each figure, table and text that notebooks hold."""
    rows = []
    for path in NOTEBOOKS:
        for section, cell in code_cells(path):
            compared = "nbval-check-output" in cell.metadata.get("tags", [])
            for kind, content in map(kind_and_content, cell.outputs):
                if content:
                    rows.append([path.stem, section, cell.execution_count, kind, compared, sha256(content)])
    return pd.DataFrame(rows, columns=["notebook", "section", "cell", "kind", "compared", "sha256"])


def makers():
    """Cells that save figures: the name given to `plots.save`, as a pattern, and where; literal names first."""
    found = []
    for path in NOTEBOOKS:
        for _, cell in code_cells(path):
            for prefix, name in re.findall(r'plots\.save\([^,]+, (f?)"([^"]+)"', cell.source):
                pattern = re.sub(r"\\{\w+\\}", r"\\w+", re.escape(name)) if prefix else re.escape(name)
                found.append((bool(prefix), pattern, f"{path.relative_to(ROOT)}, cell {cell.execution_count}"))
    return [found[1:] for found in sorted(found)]


def files():
    """Every figure file, of which cell it is and whether README shows it, and every notebook with what it holds."""
    readme, made_by, held = (ROOT / "README.md").read_text(), makers(), outputs()
    for path in sorted((ROOT / "figures").iterdir()):
        name = path.relative_to(ROOT).as_posix()
        cells = (where for pattern, where in made_by if re.fullmatch(pattern, path.stem))
        cell = next(cells, "key of the library's code, by which all of this was made")
        yield path, f"{cell}; shown in README.md" if f"]({name})" in readme else cell
    for path in NOTEBOOKS:
        of_notebook = held[held["notebook"] == path.stem]
        kinds = of_notebook["kind"].value_counts()
        counted = ", ".join(f"{kinds.get(kind, 0)} {kind}s" for kind in ("figure", "table", "text"))
        yield path, f"{counted}; {of_notebook['compared'].sum()} of them are compared with a fresh run"


def as_written(dumper, text):
    """Lines stay lines in YAML."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


def configuration():
    """Text of codecheck.yml."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    manifest = [
        {"file": path.relative_to(ROOT).as_posix(), "comment": comment, "sha256": sha256(path.read_bytes())}
        for path, comment in files()
    ]
    about = "every output of the notebooks, by cell, and whether a fresh run is compared with it"
    manifest.append({"file": MANIFEST.relative_to(ROOT).as_posix(), "comment": about})
    paper = {"title": citation["title"], "authors": [{"name": each["name"]} for each in citation["authors"]]}
    paper["reference-other"] = [f"https://doi.org/{citation['preferred-citation']['doi']}"]
    version = "https://codecheck.org.uk/spec/config/2.0/"
    document = {"version": version, "paper": paper, "source": HOW, "manifest": manifest}
    yaml.SafeDumper.add_representer(str, as_written)
    return yaml.safe_dump(document, explicit_start=True, sort_keys=False, width=120)


if __name__ == "__main__":
    MANIFEST.parent.mkdir(exist_ok=True)
    outputs().to_csv(MANIFEST, index=False)
    (ROOT / "codecheck.yml").write_text(configuration())
