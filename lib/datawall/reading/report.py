"""The HTML report of a run: a folder of pages that reads from the file system, offline.

`python -m datawall.reading.report runs/quick` writes `runs/quick/report/index.html`: the verdicts, figures and
costs, every executed notebook, tables that sort and filter, and for every number the artifacts that it was made
from.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from datawall import tasks
from datawall.analysis import results, verdicts
from datawall.analysis.results import select
from datawall.engine import disk, paths, provenance
from datawall.engine.provenance import Made
from datawall.planning import plan as planning
from datawall.reading import labels, notebooks
from datawall.study import evaluation, params
from datawall.study.study import Study, open_study

TEMPLATES = paths.PACKAGE_DATA / "report"
DEFAULT = "quick"  # the study that others are compared with
# The summary shows the first three of these figures that the run has.
SHOWN = (
    *("learning_curves_zeroshot_classification", "saturation_points", "beside_published"),
    *("learning_curves_perturbation_response", "learning_curves_finetuned_classification"),
)
# Parameters that no number depends on.
IN_NO_NUMBER = {"study", "executor", "storage", "workers", "gpus", "retries", "time_limit", "memory_gib"}
KINDS = ("corpus", "dataset", "split", "contamination", "sketch", "subset", "model", "embedding", "evaluation")


class Cell(NamedTuple):
    """A table's cell; `sort` is what it is sorted by, if not its text."""

    text: str
    href: str | None = None
    sort: float | None = None


@dataclass(frozen=True)
class Table:
    """A table as a page shows it."""

    title: str
    head: list[str]
    rows: list[list[Cell]]


def write(run_dir: str | Path) -> Path:
    """Write the report of a run (`runs/quick`, say) into its folder, in place of an earlier one.

    Of a run that is not complete it has what there is. Returns the path of its first page. Raises FileNotFoundError if
    the folder holds no study, ValueError if its results are damaged.
    """
    return Site(open_study(str(run_dir))).write()


class Site:
    """The pages of a report, of a study with the folder of its run."""

    def __init__(self, study: Study) -> None:
        self.study = study
        self.results, self.intervals = (
            results.read_results(study.folder, table)
            if (study.folder / f"{table}.parquet").is_file()
            else pd.DataFrame(columns=results.ALL_COLUMNS)
            for table in ("results", "intervals")
        )
        own = self.results[self.results["model"] != results.CHANCE]  # rows of chance carry another's `run_id`
        self._runs = own.drop_duplicates("run_id").set_index("run_id")
        self._values: dict[str, dict[str, dict[str, float]]] = {}  # of a run by metric and split
        columns = (own[name] for name in ("run_id", "metric", "split", "value"))
        for run_id, metric, split, value in zip(*columns, strict=True):
            self._values.setdefault(run_id, {}).setdefault(metric, {})[split] = value
        self.tasks = [task for task in study.params.tasks if task in set(self.results["task"])]
        self.artifacts = provenance.read(study.folder / "store")
        scored = [self.artifacts[key] for key in self.results["run_id"].unique() if key in self.artifacts]
        sources = {made.key: made for each in scored for made in provenance.upstream(each, self.artifacts)}
        self.made = _in_order([*sources.values(), *scored])  # all that the results are made from
        self.notebooks = [notebooks.Notebook(path) for path in sorted((study.folder / "notebooks").glob("*.ipynb"))]
        self.changes = changes(params.read(paths.repository() / "params" / f"{DEFAULT}.yaml"), study.params)
        figures = study.folder / "figures"
        self.figures = sorted(path.stem for path in figures.glob("*.svg"))
        self.downloads = [
            *(path for name in self.figures for path in sorted(figures.glob(f"{name}.*"))),
            *sorted(study.folder.glob("*.csv")),
            *sorted(study.folder.glob("study.yaml")),
        ]

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """What the results say (`verdicts.table`)."""
        budgets = self.study.folder / "budgets.parquet"
        checked = results.read_results(self.study.folder, "budgets") if budgets.is_file() else None
        margin = results.parameters(self.study.folder).get("margin")
        return verdicts.table(self.intervals, checked, margin, evaluation.right_cells(self.study))

    @cached_property
    def sentences(self) -> list[str]:
        """The verdicts in words; of results of another study than that of the folder, what is other about it."""
        then, now = results.parameters(self.study.folder), self.study.params.model_dump(mode="json")
        if other := [key for key in now if key not in IN_NO_NUMBER and then and then.get(key) != now[key]]:
            return [
                f"The results are not those of study.yaml as it is now: they are of other {', '.join(other)}. Its own "
                "come with the stages of its tasks."
            ]
        return verdicts.sentences(self.verdicts)

    def write(self) -> Path:
        """Write the pages into the folder of the run; returns the path of the first."""
        folder = self.study.folder / "report"
        with disk.name_disk_errors(folder), disk.temporary_folder(folder.parent) as scratch:
            for name, page in self.pages():
                (scratch / name).parent.mkdir(exist_ok=True)
                (scratch / name).write_text(page, encoding="utf-8")
            (scratch / "files").mkdir()
            for path in self.downloads:
                shutil.copy(path, scratch / "files")
            shutil.copy(TEMPLATES / "tables.js", scratch)
            styles = (TEMPLATES / "style.css").read_text(encoding="utf-8") + notebooks.code_colours()
            (scratch / "style.css").write_text(styles, encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(scratch, folder)
        return folder / "index.html"

    def pages(self) -> Iterator[tuple[str, str]]:
        """Name and content of every page."""
        yield "index.html", self._page("summary", "Summary", **self._summary())
        for task in self.tasks:
            yield f"results_{task}.html", self._page("results", "Results", task=task, table=self._results(task))
        yield "figures.html", self._page("figures", "Figures")
        neighbours = zip([None, *self.notebooks], [*self.notebooks[1:], None], strict=False)
        for notebook, (before, after) in zip(self.notebooks, neighbours, strict=False):
            content = {"changes": self.changes, "notebook": notebook, "body": notebook.html()}
            page = self._page("notebook", notebook.opening[0], "../", **content, before=before, after=after)
            yield f"notebooks/{notebook.name}.html", page
        yield "provenance.html", self._page("provenance", "Provenance", tables=self._provenance())
        pages: dict[str, list[dict[str, Any]]] = {}
        for made in self.made:
            pages.setdefault(_link(made.key).partition("#")[0], []).append(self._artifact(made))
        for name, artifacts in pages.items():
            yield name, self._page("artifacts", "Artifacts", "../", artifacts=artifacts)

    def _page(self, template: str, title: str, root: str = "", **content: Any) -> str:
        page = _environment().get_template(f"{template}.html.j2")
        return page.render(site=self, title=title, root=root, **content)

    def _summary(self) -> dict[str, Any]:
        cells = {(row["model"], row["task"], row["dataset"]): row for row in self.verdicts.to_dict("records")}
        return {
            "plan": sum((Counter(counts) for _, counts in planning.counts(self.study)), Counter()),
            "sentences": self.sentences,
            "columns": self.verdicts.drop_duplicates(["task", "dataset"]).to_dict("records") if cells else [],
            "models": [model for model in self.study.params.models if model in {key[0] for key in cells}],
            "cells": cells,
            "figures": [name for name in SHOWN if name in self.figures][:3],
            "costs": self._costs(),
            "totals": provenance.costs(self.made)[["seconds", "n_bytes"]].sum(),
            "versions": provenance.versions(self.made),
            "devices": sorted({str(made.made.get("device", "unknown")) for made in self.made}),
            "changes": self.changes,
            "of": date.fromtimestamp((self.study.folder / "study.yaml").stat().st_mtime).isoformat(),
        }

    def _costs(self) -> Table:
        rows = [
            [
                Cell(_label_parts(row.what)),
                _number(row.n, "{:,.0f}".format),
                _number(row.seconds, provenance.duration),
                _number(row.longest, provenance.duration),
                _number(row.memory_mib, "{:,.0f}".format),
                _number(row.n_bytes / 1e6, "{:,.1f}".format),
                Cell(row.device),
            ]
            for row in provenance.costs(self.made).itertuples()
        ]
        head = ["made", "artifacts", "time, all", "time, longest", "peak memory (MiB)", "disk (MB)", "on"]
        return Table("Costs", head, rows)

    def _results(self, task: str) -> Table:
        """A row per evaluation of a task, a column per metric; means over splits."""
        shown = select(self.results, task=task)
        run = results.RUN[:-1]
        ids = shown.drop_duplicates(run).set_index(run)["run_id"]
        means = results.mean_over_splits(shown)
        metrics = sorted(means["metric"].unique(), key=lambda metric: (metric != tasks.HEADLINE.get(task), metric))
        wide = means.pivot_table(index=run, columns="metric", values="value")[metrics]
        rows = [
            [
                Cell(row["model"], href=_link(row["run_id"]) if row["run_id"] in self.artifacts else None),
                Cell(labels.label(row["strategy"])),
                _number(row["percentage"], "{:g}".format),
                _number(row["seed"], "{:g}".format) if row["seed"] >= 0 else Cell("", sort=-1),
                _number(row["n_cells"], "{:,.0f}".format),
                Cell(labels.label(row["dataset"])),
                *(_number(row[metric], "{:.3f}".format) for metric in metrics),
            ]
            for row in wide.join(ids).reset_index().to_dict("records")
        ]
        names = [labels.label(metric).replace("_", " ") for metric in metrics]
        head = ["model", "strategy", "% of corpus", "seed", "cells", "data set", *names]
        return Table(labels.label(task), head, rows)

    def _provenance(self) -> list[Table]:
        """A table per kind of artifact."""
        rows = {}
        for made in self.made:
            row = [
                Cell(made.key, href=_link(made.key)),
                Cell(about(made)),
                _number(made.made.get("seconds"), provenance.duration),
                _number(made.made.get("peak_memory_mib"), "{:,.0f}".format),
                _number(made.n_bytes / 1e6, "{:,.2f}".format),
            ]
            rows.setdefault(made.kind, []).append(row)
        head = ["key", "made from", "time", "peak memory (MiB)", "disk (MB)"]
        return [Table(kind, head, rows_of_kind) for kind, rows_of_kind in rows.items()]

    def _artifact(self, artifact: Made) -> dict[str, Any]:
        """What an artifact was made from, and the metrics of an evaluation, a column per split."""
        sources = _in_order(provenance.upstream(artifact, self.artifacts))
        content = {"one": artifact, "sources": sources, "keys_behind": {source.key for source in sources}, "run": None}
        if artifact.key not in self._values:
            return content
        values = self._values[artifact.key]
        splits = list(dict.fromkeys(split for by_split in values.values() for split in by_split))
        rows = [
            [Cell(labels.label(metric)), *(_number(by_split.get(split), "{:.4f}".format) for split in splits)]
            for metric, by_split in sorted(values.items())
        ]
        table = Table("Metrics by split", ["metric", *splits], rows)
        return content | {"run": self._runs.loc[artifact.key], "table": table}


def _link(key: str) -> str:
    """Page and place of an artifact: some share a page, since files by the thousand are slow."""
    return f"artifacts/{key[:2]}.html#{key}"


def changes(default: params.Params, other: params.Params) -> list[tuple[str, str, str]]:
    """What a study has otherwise than the default one: key, default value, its value."""
    before, after = (_flat(study.model_dump(exclude={"study"})) for study in (default, other))
    keys = dict.fromkeys([*before, *after])
    return [(key, _text(before.get(key)), _text(after.get(key))) for key in keys if before.get(key) != after.get(key)]


def _in_order(artifacts: list[Made]) -> list[Made]:
    """Artifacts by kind, as they are made in a study."""
    order = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(artifacts, key=lambda made: order.get(made.kind, 0))


def about(artifact: Made) -> str:
    """The plain values of an artifact's record in a line."""
    plain = [value for value in _flat(artifact.record).items() if not re.fullmatch("[0-9a-f]{16}", str(value[1]))]
    return ", ".join(f"{name} {_text(value)}" for name, value in plain if value not in (None, [], {}))


def _label_parts(label: str) -> str:
    """The label of an artifact as a reader should see it."""
    return ": ".join(labels.label(part) for part in label.split(": "))


def _number(value: float | None, text: Callable[[float], str]) -> Cell:
    """A number to show and sort by; an empty cell if there is none."""
    return Cell("") if value is None or pd.isna(value) else Cell(text(value), sort=float(value))


def _text(value: Any) -> str:
    """A value of a study file or record as a reader wants it."""
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # All that comes from data is escaped.
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, **options)
    environment.filters |= {"label": labels.label, "duration": provenance.duration}
    environment.filters |= {"text": _text, "about": about, "what": _label_parts, "link": _link}
    return environment


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m datawall.reading.report RUN_FOLDER, say runs/quick")
    try:
        sys.stdout.write(f"{write(sys.argv[1])}\n")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
