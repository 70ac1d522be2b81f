"""A study file for data of one's own, proposed from a look into them: `run_all.py --new`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from datawall.cells import datasets, sampling
from datawall.engine import disk, paths
from datawall.planning import inspection
from datawall.planning.inspection import Looked
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
    "cell_type": "clusters (leiden) stand in for cell types",
    "batch": "zero-shot integration is left out",
    "donor": "cells are split whoever they are from",
    "perturbation": "perturbation response is left out",
}
CONTROL = (
    r"ctrl|control|untreated|unstim|vehicle|dmso|mock|pbs|naive|baseline|normal|healthy|wild.?type|non.?target|scrambl|"
    r"^(wt|none|ntc?)$"
)
KEYS = {"label": "cell_type_key", "batch": "batch_key", "donor": "donor_key", "perturbation": "perturbation_key"}
KEYS["control"] = "control"  # of the study file, by option of the command
NONE = "none"  # the answer that leaves a role out
MOST_TYPES = 500
FEW = 50  # cells; a subset with fewer teaches little
DEFAULT_CELLS = 9_799  # that the default study pretrains on
STARTS = (1, 2, 3, 5, 10, 20, 50)  # smallest percentages to choose from
TEMPLATE = "study.yaml.j2"

type Roles = dict[str, str | None]  # columns, and the control
type Ask = Callable[[str, str], str]  # a question and the proposal; the answer


def new(
    name: str,
    corpora: Sequence[str],
    given: Roles,
    *,
    ask: Ask | None,
    say: Callable[[str], None],
    settings: dict[str, Any] | None = None,
) -> Path:
    """Write `params/<name>.yaml` for a corpus, paths of files or one named data set, after a look into it.

    What is `given`, columns by role and the control (keys of `QUESTIONS`) or `none`, is taken as it is; what is absent
    or None is asked for, or else proposed. `say` tells what is found; `settings` are more keys of the study file.
    Raises FileExistsError if there is such a study file, and ValueError (as are ParamsError and CorpusError) or
    DatasetError if the name is none, a file breaks a rule or what was given is not there.
    """
    path, settings = paths.repository() / "params" / f"{name}.yaml", settings or {}
    if taken := [option for option, key in KEYS.items() if key in settings]:
        raise ValueError(f"--set {KEYS[taken[0]]}: with --new, name it as --{taken[0]}.")
    plain = {key: value for key, value in settings.items() if key in ("min_matched_genes", "held_out", "percentages")}
    default = params.read(paths.repository() / "params" / "quick.yaml", {"study": name, **plain})
    if path.exists():
        raise FileExistsError(f"{path}: there is such a study file; choose another name, or remove it.")
    named = [key for role, key in given.items() if role != "control" and key]
    looks = [inspection.look(corpus, named, min_matched=default.min_matched_genes) for corpus in corpora]
    for looked in looks:
        say(str(looked))
    looked = _joined(looks)
    roles = _choose(looked, given, ask, say)
    for note in (note for part in looks for note in part.notes(roles)):
        say(f"warning: {note}")
    text = _with(study_file(name, [_portable(corpus) for corpus in corpora], looked, roles, default), settings)
    params.check(params.from_yaml(text), path.name)
    disk.write_text(path, text)
    return path


def propose(looked: Looked) -> Roles:
    """The columns that a study is likely to want, by role, and the `control`; None where no column looks like it.

    A cell type, batch or donor needs at least two values and no gaps; a perturbation two or more, one of them called
    like a control.
    """
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


def study_file(name: str, corpora: list[str], looked: Looked, roles: Roles, default: params.Params) -> str:
    """The text of a study file, with comments that say what was found; the rest is as in the default study."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    named = {KEYS["label" if role == "cell_type" else role] for role, value in roles.items() if value}
    labels, contexts = looked.obs.get(roles["cell_type"]), None
    if labels is not None and roles["perturbation"]:  # the types with the most cells both with and without treatment
        untreated = looked.obs[roles["perturbation"]] == roles["control"]
        contexts = pd.crosstab(labels, untreated).min(axis=1).nlargest(2).index.tolist()
    n_pretraining = round(looked.n_cells * (1 - default.held_out))
    environment = Environment(  # noqa: S701 - YAML, not HTML: values and comments pass through filters of their own
        loader=FileSystemLoader(paths.PACKAGE_DATA), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    # As many passes over the corpus as in the default study, and no fewer steps, but ten times as many at most.
    longer = min(10.0, max(1.0, n_pretraining / DEFAULT_CELLS))
    steps = {name: round(longer * n, -2) for name, n in {"": default.steps, **default.steps_by_model}.items()}
    environment.filters |= {"yaml": _yaml, "comment": lambda text: " ".join(str(text).split())}
    return environment.get_template(TEMPLATE).render(
        name=name,
        corpus=corpora[0] if len(corpora) == 1 else corpora,
        looked=looked,
        roles=roles | {"cell_type": roles["cell_type"] or params.CLUSTERS},
        about={role: describe(looked, key) if key else "" for role, key in roles.items()},
        n_pretraining=n_pretraining,
        sizes=sizes(n_pretraining, default.percentages),
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


def _choose(looked: Looked, given: dict[str, str | None], ask: Ask | None, say: Callable[[str], None]) -> Roles:
    """The column of each role, and the control: given, asked for, or proposed."""
    roles, proposed = {}, propose(looked)
    for role, question in QUESTIONS.items():
        if role == "control" and roles["perturbation"] is None:
            roles[role] = None
            continue
        if role == "control" and roles["perturbation"] != proposed["perturbation"]:
            proposed[role] = control_of(looked.obs[roles["perturbation"]])
        likely, asked = proposed[role] or NONE, ask is not None and not given.get(role)
        answer = ask(question, likely) if asked else given.get(role) or likely
        while fault := _fault(looked, roles, role, answer):
            if not asked:
                raise ValueError(fault)
            say(fault)
            answer = ask(question, likely)
        roles[role] = None if answer in (NONE, params.CLUSTERS) else answer
        about = answer if role == "control" else f"{answer}, {describe(looked, answer)}"
        say(f"{role.replace('_', ' ')}: {WITHOUT[role] if roles[role] is None else about}")
    return roles


def _fault(looked: Looked, roles: Roles, role: str, answer: str) -> str | None:
    """Why an answer will not do."""
    if role == "control":
        values = looked.obs[roles["perturbation"]].unique().tolist()
        return None if answer in values else f"{answer!r} is no value of {roles['perturbation']!r}; they are {values}."
    if answer == NONE or (role == "cell_type" and answer == params.CLUSTERS):
        return None
    return next(iter(looked.faults([answer])), None)


def _joined(looks: list[Looked]) -> Looked:
    """Several files as one, with the columns that all have."""
    if len(looks) == 1:
        return looks[0]
    shared = [key for key in looks[0].columns if all(key in looked.columns for looked in looks)]
    labels = [key for key in shared if all(key in looked.obs for looked in looks)]
    obs = pd.concat([looked.obs[labels].astype(object) for looked in looks], ignore_index=True).astype("category")
    names = ", ".join(looked.name for looked in looks)
    unreadable = {key: why for looked in looks for key, why in looked.unreadable.items()}
    return Looked(names, sum(looked.n_cells for looked in looks), looks[0].match, shared, obs, unreadable)


def _with(text: str, settings: dict[str, Any]) -> str:
    """A study file with more keys; one that it has already gets another value, in its place."""
    lines = text.rstrip().split("\n")
    for key, value in settings.items():
        line = f"{key}: {_yaml(value)}"
        at = next((i for i, old in enumerate(lines) if old.startswith(f"{key}:")), None)
        if at is None:
            lines += [*(["", "# As given with --set."] * ("# As given with --set." not in lines)), line]
            continue
        end = next((i for i in range(at + 1, len(lines)) if not lines[i].startswith(" ")), len(lines))
        lines[at:end] = [line]
    return "\n".join(lines) + "\n"


def _portable(name: str) -> str:
    """A corpus as the study file names it, so that it is found from the repository and from elsewhere."""
    if name in datasets.DATASETS or (paths.repository() / name).exists():
        return name
    return str(Path(name).resolve())


def _yaml(value: Any) -> str:
    """A value in YAML, on one line."""
    text = params.to_yaml(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
