"""A study file for data of one's own, proposed from a look into them: `run_all.py --new`."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from datawall.cells import corpus, datasets, sampling, sources
from datawall.cells.backed import CellFile
from datawall.cells.corpus import CorpusError, GeneMatch
from datawall.engine import disk, paths
from datawall.study import params
from datawall.tasks import TASKS

# What columns are called, likelier names first.
TYPES = r"^cell.?types?$", r"cell.?type", r"annot|cell.?(label|class|state|identity)", r"^labels?$|ontology"
SAMPLES = r"sample|library|lane|channel|replicate|^run$|plate|^orig.?ident$"
NAMES = {
    "cell_type": (*TYPES, r"leiden|louvain|clusters?$"),
    "batch": (r"^batch", SAMPLES, r"assay|technolog|chemistry|platform", r"donor|patient|individual|subject|data.?set"),
    "donor": (r"donor", r"patient|individual|subject|participant"),
    "perturbation": (r"perturb", r"condition|treat|stim", r"drug|compound|disease|status|group"),
}
QUESTIONS = {
    "cell_type": "column with the cell types (or leiden, to cluster instead)",
    "batch": "column with the batches",
    "donor": "column with the donors",
    "perturbation": "column with the perturbation",
    "control": "its value for untreated cells",
}
WITHOUT = {  # what a study does without a role
    "cell_type": "clusters (leiden) of principal components stand in for cell types, which favours PretrainedPCA",
    "batch": "zero-shot integration is left out",
    "donor": "cells are split whoever they are from",
    "perturbation": "perturbation response is left out",
}
CONTROL = r"ctrl|control|untreated|unstim|vehicle|dmso|mock|pbs|naive|baseline|normal|healthy"
CONTROL += r"|wild.?type|non.?target|scrambl|^(wt|none|ntc?)$"
KEYS = {role: role if role == "control" else f"{role}_key" for role in QUESTIONS}  # of the study file
NONE = "none"  # the answer that leaves a role out
MANY = 1000  # distinct values; a column with more labels no cells
MOST_TYPES = 500
FEW = 50  # cells; a subset with fewer teaches little
DEFAULT_CELLS = 9_799  # that the default study pretrains on
STARTS = (1, 2, 3, 5, 10, 20, 50)  # smallest percentages to choose from

type Roles = dict[str, str | None]  # columns, and the control
type Ask = Callable[[str, str], str]  # a question and the proposal; the answer
type Say = Callable[[str], None]


@dataclass(frozen=True)
class Looked:
    """What is in a corpus."""

    name: str
    n_cells: int
    matches: list[GeneMatch]  # of its files
    notes: list[str]  # what a reader should know of counts and genes
    columns: list[str]  # of obs, those that all files have
    obs: pd.DataFrame  # columns asked for, and those likely to label cells; categorical, NaN where missing
    unreadable: dict[str, str]  # columns that cannot be read, and why

    def __str__(self) -> str:
        return f"{self.name}: {self.n_cells:,} cells, {'; '.join(map(str, self.matches))}"

    def fault(self, key: str) -> str | None:
        """What is wrong with a column that a study names."""
        if key not in self.columns:
            return corpus.no_column(self.name, key, self.columns)
        if key in self.obs and (missing := int(self.obs[key].isna().sum())):
            return f"{self.name}: column {key!r} is missing for {missing:,} cells; label or drop them."
        return self.unreadable.get(key)


def look(corpora: Sequence[str], keys: Iterable[str] = (), *, min_matched: float = 0.5) -> Looked:
    """Look into a named data set, which is loaded, or files, of which counts are sampled and labels read.

    Columns named by `keys` are looked at if they are there, whatever is in them; others if they are likely to label
    cells, with few values and no fractions. For `min_matched` see `corpus.check_match`. Raises CorpusError if a data
    set breaks a rule, columns apart.
    """
    name = ", ".join(corpora)
    if name in datasets.DATASETS:
        adata, match = corpus.align(datasets.load(name), name, min_matched=min_matched)
        obs = adata.obs.astype("category").reset_index(drop=True)
        return Looked(name, adata.n_obs, [match], list(match.notes), list(adata.obs), obs, unreadable={})
    files = [datasets.file(file) for file in corpora]
    source = sources.open_source(files, {}, sources.Options(min_matched=min_matched))
    columns, tables, unreadable = [], [], {}
    for path in files:
        read = {}
        with CellFile(path) as cells:
            columns.append(cells.columns())
            for key in columns[-1]:
                try:
                    read[key] = _labels(cells, key, None if key in keys else MANY)
                except CorpusError as error:
                    unreadable[key] = str(error)
        tables.append(pd.DataFrame({key: labels for key, labels in read.items() if labels is not None}))
    shared = [key for key in columns[0] if all(key in of_file for of_file in columns)]
    joined = [table.astype(object) for table in tables]
    obs = pd.concat(joined, join="inner", ignore_index=True).astype("category") if len(files) > 1 else tables[0]
    return Looked(name, source.n_cells, source.matches, source.notes, shared, obs, unreadable)


def _labels(cells: CellFile, key: str, most: int | None) -> pd.Categorical | None:
    """A column as labels; None if there is a limit, and it has more values, or fractions."""
    parts, seen = [], set()
    for start in range(0, cells.n_cells, sources.SCAN):
        values = cells.column(key, "label", start, start + sources.SCAN)
        if most and values.dtype.kind == "f" and (values % 1 != 0).any():
            return None
        codes, labels = corpus.label_codes(values)
        seen.update(labels)
        if most and len(seen) > most:
            return None
        parts.append(pd.Categorical.from_codes(codes, labels))
    return pd.api.types.union_categoricals(parts)


def new(name: str, corpora: Sequence[str], given: Roles, settings: dict[str, Any], ask: Ask | None, say: Say) -> Path:
    """Write `params/<name>.yaml` for a corpus, paths of files or one named data set, after a look into it.

    What is `given`, columns by role and the control (keys of `QUESTIONS`) or `none`, is taken as it is; what is absent
    or None is asked for, or else proposed. `settings` are more keys of the study file; `say` tells what is found.
    Raises FileExistsError, or ValueError (as are ParamsError and CorpusError).
    """
    path = paths.repository() / "params" / f"{name}.yaml"
    if taken := [role for role, key in KEYS.items() if key in settings]:
        option = "label" if taken[0] == "cell_type" else taken[0]
        raise ValueError(f"--set {KEYS[taken[0]]}: with --new, name it as --{option}.")
    plain = {key: value for key, value in settings.items() if key in ("min_matched_genes", "held_out", "percentages")}
    default = params.read(paths.repository() / "params" / "quick.yaml", {"study": name, **plain})
    if path.exists():
        raise FileExistsError(f"{path}: there is such a study file; choose another name, or remove it.")
    named = [key for role, key in given.items() if role != "control" and key]
    looked = look(corpora, named, min_matched=default.min_matched_genes)
    say(str(looked))
    for key, n_missing in looked.obs.isna().sum().items():
        if n_missing and key not in named:
            say(f"column {key!r} is not proposed: {n_missing:,} cells have no value in it")
    roles = _choose(looked, given, ask, say)
    notes = list(looked.notes)
    for role, key in roles.items():
        if key in looked.obs:
            notes += corpus.label_notes(looked.obs[key].value_counts().to_dict(), f"{looked.name}: {key!r}", role)
    for note in notes:
        say(f"warning: {note}")
    # Files that are not found from the repository have their whole path.
    known = [file in datasets.DATASETS or (paths.repository() / file).exists() for file in corpora]
    portable = [file if here else str(Path(file).resolve()) for file, here in zip(corpora, known, strict=True)]
    text = _with(study_file(name, portable, looked, roles, default, settings), settings)
    params.check(params.from_yaml(text), path.name)
    disk.write_text(path, text)
    return path


def propose(looked: Looked) -> Roles:
    """The columns without gaps that a study is likely to want, by role, and the `control`; None where none looks so."""
    obs = looked.obs.loc[:, looked.obs.notna().all()]
    counts = {key: int(obs[key].nunique()) for key in obs}
    allowed = {
        "cell_type": [key for key in obs if 2 <= counts[key] <= MOST_TYPES],
        "batch": [key for key in obs if 2 <= counts[key] < looked.n_cells / FEW],
        "donor": [key for key in obs if counts[key] >= 2],
        "perturbation": [key for key in obs if control_of(obs[key]) is not None],
    }
    roles = {}
    for role, patterns in NAMES.items():
        likely = (key for name in patterns for key in allowed[role] if re.search(name, key, re.IGNORECASE))
        roles[role] = next(likely, None)
    return roles | {"control": control_of(obs[roles["perturbation"]]) if roles["perturbation"] else None}


def control_of(labels: pd.Series) -> str | None:
    """The value that means untreated, if there are two or more and one of them alone is called so."""
    values = [str(value) for value in labels.dropna().unique()]
    controls = [value for value in values if re.search(CONTROL, value, re.IGNORECASE)]
    return controls[0] if len(values) > 1 and len(controls) == 1 else None


def study_file(
    name: str, corpora: list[str], looked: Looked, roles: Roles, default: params.Params, settings: dict[str, Any]
) -> str:
    """The text of a study file, with comments that say what was found; the rest is as in the default study.

    Of the `settings` that will be in it, what is written heeds `labels` and `percentages`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    named = {KEYS[role] for role, value in roles.items() if value}
    labels, contexts = looked.obs.get(roles["cell_type"]), None
    if labels is not None and roles["perturbation"]:  # the types with the most cells both with and without treatment
        untreated = looked.obs[roles["perturbation"]] == roles["control"]
        labels = labels.astype(str).replace(settings.get("labels") or {})
        contexts = pd.crosstab(labels, untreated).min(axis=1).nlargest(2).index.tolist()
    n_pretraining = round(looked.n_cells * (1 - default.held_out))
    environment = Environment(  # noqa: S701 - YAML, not HTML: values and comments pass through filters of their own
        loader=FileSystemLoader(paths.PACKAGE_DATA), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # As many passes over the corpus as in the default study, and no fewer steps, but ten times as many at most.
    longer = min(10.0, max(1.0, n_pretraining / DEFAULT_CELLS))
    steps = {name: max(n, round(longer * n, -2)) for name, n in {"": default.steps, **default.steps_by_model}.items()}
    drawn = {p: sampling.subset_size(n_pretraining, p) for p in default.percentages}
    environment.filters |= {"yaml": _yaml, "comment": lambda text: " ".join(str(text).split())}
    return environment.get_template("study.yaml.j2").render(
        name=name,
        corpus=corpora[0] if len(corpora) == 1 else corpora,
        looked=looked,
        roles=roles | {"cell_type": roles["cell_type"] or params.CLUSTERS},
        about={role: describe(looked, key) if key else "" for role, key in roles.items()},
        n_pretraining=n_pretraining,
        sizes=drawn if "percentages" in settings else sizes(n_pretraining, default.percentages),
        steps=int(steps.pop("")),
        steps_by_model={name: int(n) for name, n in steps.items()},
        tasks=[task for task in default.tasks if named.issuperset(TASKS[task].needs)],
        contexts=contexts,
        default=default,
    )


def sizes(n_cells: int, percentages: Sequence[float]) -> dict[int, int]:
    """Percentages to draw and the cells that each is: those given but for too small ones, at least four if need be."""
    start = next((p for p in STARTS if sampling.subset_size(n_cells, p) >= FEW), 100)
    wanted = [start, *(round(p) for p in percentages if p > start)]
    wanted = wanted if len(wanted) >= 4 else sorted({*wanted, 50})
    return {p: sampling.subset_size(n_cells, p) for p in wanted}


def describe(looked: Looked, key: str) -> str:
    """A column in a few words: how many values, and the most frequent."""
    if key not in looked.obs:
        return ""
    counts = looked.obs[key].value_counts()
    names = [value if value.isprintable() else repr(value) for value in counts.index[:3]]
    most = ", ".join(f"{name} ({n:,})" for name, n in zip(names, counts, strict=False))
    return f"{len(counts)} values: {most}{', …' if len(counts) > 3 else ''}"


def _choose(looked: Looked, given: Roles, ask: Ask | None, say: Say) -> Roles:
    """The column of each role, and the control: given, asked for, or proposed."""
    roles, proposed = {}, propose(looked)
    for role, question in QUESTIONS.items():
        if role == "control" and not roles["perturbation"]:
            return roles | {role: None}
        labels = looked.obs[roles["perturbation"]] if role == "control" else None
        if labels is not None:
            proposed[role] = control_of(labels)
        likely, asked = proposed[role] or NONE, ask is not None and not given.get(role)
        answer = ask(question, likely) if asked else given.get(role) or likely
        while fault := _fault(looked, labels, role, answer):
            if not asked:
                raise ValueError(fault)
            say(fault)
            answer = ask(question, likely)
        roles[role] = None if answer in (NONE, params.CLUSTERS) else answer
        about = answer if role == "control" else f"{answer}, {describe(looked, answer)}"
        say(f"{role.replace('_', ' ')}: {WITHOUT[role] if roles[role] is None else about}")
    return roles


def _fault(looked: Looked, treatments: pd.Series | None, role: str, answer: str) -> str | None:
    """Why an answer will not do."""
    if treatments is not None:
        values = treatments.unique().tolist()
        return None if answer in values else f"{answer!r} is no value of {treatments.name!r}; they are {values}."
    if answer == NONE or (role == "cell_type" and answer == params.CLUSTERS):
        return None
    return looked.fault(answer)


def _with(text: str, settings: dict[str, Any]) -> str:
    """A study file with more keys; one that it has already gets another value, in its place."""
    text = text.rstrip() + "\n"
    for key, value in settings.items():
        line = f"{key}: {_yaml(value)}\n"
        text, n_replaced = re.subn(rf"^{key}:.*\n(?: .*\n)*", lambda _, line=line: line, text, flags=re.MULTILINE)
        text += "" if n_replaced else line
    return text


def _yaml(value: Any) -> str:
    """A value in YAML, on one line."""
    text = params.to_yaml(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
