"""The HTML report of a run: a folder of pages that reads from the file system, offline.

`python -m datawall.reading.report runs/quick` writes `runs/quick/report/index.html`: verdicts, figures and costs, every
executed notebook, tables that sort and filter, and for every number what it was made from.
"""

import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import date
from functools import cache, cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from datawall import tasks
from datawall.analysis import results, verdicts, walls
from datawall.analysis.results import select
from datawall.engine import disk, paths, processes, store
from datawall.engine.store import Artifact
from datawall.planning import plan as planning
from datawall.reading import notebooks
from datawall.reading.titles import label
from datawall.study import params, questions
from datawall.study.costs import TRAINED
from datawall.study.study import Study, open_study

TEMPLATES = paths.PACKAGE_DATA / "report"
DEFAULT = "quick"  # the study that others are compared with
# The summary shows the first three of these figures that the run has.
SHOWN = ["learning_curves_zeroshot_classification", "saturation_points", "beside_published"]
SHOWN += ["learning_curves_perturbation_response", "learning_curves_finetuned_classification"]
# Parameters that no number depends on.
IN_NO_NUMBER = {"study", "executor", "storage", "workers", "gpus", "retries", "time_limit", "memory_gib"}
KINDS = ("corpus", "dataset", "split", "contamination", "sketch", "subset", "model", "embedding", "evaluation")


# Heads of columns, and how their numbers are written, where not as a score is.
RUN = {"model": "model", "strategy": "strategy", "percentage": "% of corpus", "seed": "seed", "n_cells": "cells"}
RUN |= {"dataset": "data set"}
WRITTEN = dict.fromkeys(("time", "time, all", "time, longest"), planning.duration)
WRITTEN |= dict.fromkeys(("% of corpus", "seed"), "{:g}".format) | {"disk (MB)": "{:,.2f}".format}
WHOLE = "artifacts", "cells", "process's peak memory (MiB)", "processes", "a second"
WRITTEN |= dict.fromkeys(WHOLE, "{:,.0f}".format)


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
        self.results, self.intervals, self.budgets = map(self._table, ("results", "intervals", "budgets"))
        own = self.results[self.results["model"] != results.CHANCE]  # rows of chance carry another's `run_id`
        self.runs = own.drop_duplicates("run_id").set_index("run_id")
        # Not `pivot_table`, here and below: it drops a metric that is NaN throughout.
        self._values = own.pivot(index=["run_id", "metric"], columns="split", values="value")  # noqa: PD010
        self.tasks = [task for task in study.params.tasks if task in set(self.results["task"])]
        self.artifacts = store.read_all(study.folder / "store")
        scored = [self.artifacts[key] for key in self.results["run_id"].unique() if key in self.artifacts]
        self.made = [*self.sources(*scored), *scored]  # all that the results are made from
        self.notebooks = [notebooks.Notebook(path) for path in sorted((study.folder / "notebooks").glob("*.ipynb"))]
        self.changes = changes(params.read(paths.repository() / "params" / f"{DEFAULT}.yaml"), study.params)
        figures = study.folder / "figures"
        self.figures = sorted(path.stem for path in figures.glob("*.svg"))
        drawn = [path for name in self.figures for path in sorted(figures.glob(f"{name}.*"))]
        self.downloads = [*drawn, *sorted(study.folder.glob("*.csv")), *study.folder.glob("study.yaml")]

    def _table(self, name: str) -> pd.DataFrame:
        there = (self.study.folder / f"{name}.parquet").is_file()
        return results.read_results(self.study.folder, name) if there else pd.DataFrame(columns=results.ALL_COLUMNS)

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """What the results say (`verdicts.table`)."""
        margin = results.parameters(self.study.folder).get("margin")
        return verdicts.table(self.intervals, self.budgets, margin, questions.right_cells(self.study))

    @cached_property
    def sentences(self) -> list[str]:
        """The verdicts in words; of results of another study than that of the folder, what is other about it."""
        then, now = results.parameters(self.study.folder), self.study.params.model_dump(mode="json")
        if other := [key for key in now if key not in IN_NO_NUMBER and then and then.get(key) != now[key]]:
            told = f"they are of other {', '.join(other)}. Its own come with the stages of its tasks."
            return [f"The results are not those of study.yaml as it is now: {told}"]
        return [*verdicts.sentences(self.verdicts), *walls.sentences(questions.levers(self.study))]

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
        for place, notebook in enumerate(self.notebooks):
            page = self._page("notebook", notebook.opening[0], "../", place=place, notebook=notebook)
            yield f"notebooks/{notebook.name}.html", page
        yield "provenance.html", self._page("provenance", "Provenance", tables=self._provenance())
        for name, artifacts in groupby(sorted(self.made, key=_page_of), _page_of):
            yield name, self._page("artifacts", "Artifacts", "../", artifacts=list(artifacts))

    def _page(self, template: str, title: str, root: str = "", **content: Any) -> str:
        page = _environment().get_template(f"{template}.html.j2")
        return page.render(site=self, title=title, root=root, **content)

    def _summary(self) -> dict[str, Any]:
        cells = {(row["model"], row["task"], row["dataset"]): row for row in self.verdicts.to_dict("records")}
        versions = pd.DataFrame([made.made["versions"] for made in self.made])
        return {
            "plan": sum((Counter(counts) for _, counts in planning.counts(self.study)), Counter()),
            "columns": self.verdicts.drop_duplicates(["task", "dataset"]).to_dict("records") if cells else [],
            "models": [model for model in self.study.params.models if model in {key[0] for key in cells}],
            "cells": cells,
            "figures": [name for name in SHOWN if name in self.figures][:3],
            "costs": costs(self.made),
            "speeds": speeds(self.made),
            "versions": {package: sorted({*by_artifact.dropna()}) for package, by_artifact in versions.items()},
            "devices": sorted({made.made["device"] for made in self.made}),
            "of": date.fromtimestamp((self.study.folder / "study.yaml").stat().st_mtime).isoformat(),
        }

    def _results(self, task: str) -> pd.DataFrame:
        """A row per evaluation of a task, by its key, a column per metric; means over splits."""
        shown = select(self.results, task=task)
        ids = shown.drop_duplicates(list(RUN)).set_index(list(RUN))["run_id"]
        means = results.mean_over_splits(shown)
        metrics = sorted(means["metric"].unique(), key=lambda metric: (metric != tasks.HEADLINE.get(task), metric))
        by_metric = means.pivot(index=list(RUN), columns="metric", values="value")[metrics]  # noqa: PD010
        table = by_metric.join(ids).reset_index().set_index("run_id")
        table["seed"] = table["seed"].where(table["seed"] >= 0)
        table[["strategy", "dataset"]] = table[["strategy", "dataset"]].map(label)
        return table.rename(columns=RUN | {metric: label(metric).replace("_", " ") for metric in metrics})

    def _provenance(self) -> dict[str, pd.DataFrame]:
        """A table for each kind of artifact, a row for each by its key."""
        columns = ["kind", "key", "made from", "time", "process's peak memory (MiB)", "disk (MB)"]
        rows = [
            (made.kind, made.key, about(made), made.made["seconds"], made.made["peak_memory_mib"], made.n_bytes / 1e6)
            for made in self.made
        ]
        table = pd.DataFrame(rows, [made.key for made in self.made], columns)
        return {kind: part.drop(columns="kind") for kind, part in table.groupby("kind", sort=False)}

    def sources(self, *artifacts: Artifact) -> list[Artifact]:
        """All that artifacts were made from, by kind, as they are made in a study."""
        order = {kind: place for place, kind in enumerate(KINDS)}
        sources = store.upstream(artifacts, self.artifacts)
        return sorted(sources, key=lambda made: order.get(made.kind, 0))

    def metrics(self, key: str) -> pd.DataFrame:
        """The metrics of an evaluation, a column for each split."""
        return self._values.loc[key].dropna(axis="columns", how="all").rename(label).reset_index()


def _page_of(artifact: Artifact) -> str:
    """The page that an artifact is on: some share one, since files by the thousand are slow."""
    return f"artifacts/{artifact.key[:2]}.html"


def changes(default: params.Params, other: params.Params) -> list[tuple[str, str, str]]:
    """What a study has otherwise than the default one: key, default value, its value."""
    before, after = (_flat(study.model_dump(exclude={"study"})) for study in (default, other))
    keys = dict.fromkeys([*before, *after])
    return [(key, _text(before.get(key)), _text(after.get(key))) for key in keys if before.get(key) != after.get(key)]


def about(artifact: Artifact) -> str:
    """The plain values of an artifact's record in a line."""
    plain = [value for value in _flat(artifact.record).items() if not re.fullmatch("[0-9a-f]{16}", str(value[1]))]
    return ", ".join(f"{name} {_text(value)}" for name, value in plain if value not in (None, [], {}))


def what(artifact: Artifact) -> str:
    """What an artifact is, among others of its kind: the family of a model, the task of an evaluation."""
    name = {"model": "model", "evaluation": "task"}.get(artifact.kind)
    return f"{artifact.kind}: {label(artifact.record[name])}" if name in artifact.record else artifact.kind


def costs(artifacts: Iterable[Artifact]) -> pd.DataFrame:
    """What artifacts took, a row per kind, model family and task, in the order given.

    A process makes many of them; its peak memory is its highest until the artifact was made.
    """
    rows = [{"made": what(artifact), "mb": artifact.n_bytes / 1e6, **artifact.made} for artifact in artifacts]
    table = pd.DataFrame(rows, columns=["made", "seconds", "peak_memory_mib", "mb", "device"])
    columns = {
        "artifacts": ("seconds", "size"),
        "time, all": ("seconds", "sum"),
        "time, longest": ("seconds", "max"),
        "process's peak memory (MiB)": ("peak_memory_mib", "max"),
        "disk (MB)": ("mb", "sum"),
        "on": ("device", lambda devices: ", ".join(sorted(set(devices)))),
    }
    return table.groupby("made", sort=False).agg(**columns).reset_index()


def speeds(artifacts: Iterable[Artifact]) -> pd.DataFrame:
    """How fast models were trained, a row per family and device, over all their steps: see `study.costs.speed`."""
    trained = [artifact for artifact in artifacts if artifact.made.get("training", {}).get("operations")]
    rows = [{"family": artifact.record["model"], **artifact.made["training"]} for artifact in trained]
    keys, sums = ["family", "machine", "gpus"], ["seconds", "cells", "tokens", "operations"]
    table = []
    for key, of_family in pd.DataFrame(rows, columns=[*keys, *sums]).groupby(keys, sort=False):
        seconds, n_cells, n_tokens, operations = of_family[sums].sum()
        n, each, peak = n_tokens or n_cells, "tokens" if n_tokens else "cells", processes.peak(key[1])
        share = f"{operations / seconds / peak / key[2]:.0%}" if peak else "– (its peak is not known)"
        table.append((*key, each, n / seconds, operations / TRAINED / n, operations / seconds / 1e9, share))
    heads = ["family", "on", "processes", "of", "a second", "million multiplications each", "GFLOP/s", "of the peak"]
    return pd.DataFrame(table, columns=heads)


def _cell(value: Any, column: str, digits: int) -> str:
    """A value as a table shows it: a number as its column wants it, or else as a score; nothing if there is none."""
    if isinstance(value, str) or pd.isna(value):
        return value if isinstance(value, str) else ""
    return WRITTEN[column](value) if column in WRITTEN else f"{value:.{digits}f}"


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
    environment.filters |= {"label": label, "duration": planning.duration}
    environment.filters |= {"text": _text, "about": about, "what": what, "cell": _cell}
    environment.filters["link"] = lambda artifact: f"{_page_of(artifact)}#{artifact.key}"
    return environment


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m datawall.reading.report RUN_FOLDER, say runs/quick")
    try:
        sys.stdout.write(f"{write(sys.argv[1])}\n")
    except (FileNotFoundError, ValueError) as error:
        sys.exit(str(error))
