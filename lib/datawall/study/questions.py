"""What notebooks ask of a study's models and results, each a table or a few lines, and which runs would settle more."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from datawall import tasks
from datawall.analysis import adaptive, results
from datawall.cells.sampling import STRATEGIES
from datawall.engine import disk
from datawall.models import hyperparameters
from datawall.study import curation, joining
from datawall.study.evaluation import can_judge, evaluate, evaluation_unit, evaluations
from datawall.study.model import CHOSEN
from datawall.study.records import Run
from datawall.study.study import Study

LEVERS = [  # columns of `levers`
    *("model", "family", "label", "strategy", "seed", "n_cells", "samples", "varied"),
    *("cells", "depth", "steps", "width", "task", "dataset", "metric", "value"),
]
LEFT_OUT = {
    "random": "what random subsets tell, such as what more cells are worth",
    "untrained": "what untrained models tell: what pretraining changes",
}  # by the strategy that a study lacks


def pretrain_adaptively(study: Study) -> pd.DataFrame:
    """Choose the runs of an adaptive study, and make them: sizes and seeds only until every verdict is settled.

    Each model and task asks for runs on random subsets (`adaptive.ask`), scored by the task's headline metric, the mean
    over its data sets. What any task of a model asks for is pretrained, with the other strategies' subsets of that size
    and seed, and judged by all tasks; so are all runs of `also`. A second call finds all of it, and chooses the same.
    Columns: model, task, verdict, percentage (where the plateau begins, or NaN), reason, runs (that it took) and share
    (of the full grid's).
    """
    p = study.params
    plan = adaptive.Plan(p.margin, tuple(sorted(p.percentages)), tuple(p.seeds), first_seeds=2, budget=1.0)
    for name in p.evaluation_sets():
        study.dataset_artifact(name)  # which tells what it can be judged by
    headlines = {task: tasks.TASKS[task].headline for task in p.tasks if study.joined(task)}
    headlines = {task: metric for task, metric in headlines.items() if metric and not results.lower_is_better(metric)}
    judged = [(model, task) for model in p.models for task in headlines if can_judge(study, task, model)]
    scores = {pair: defaultdict(list) for pair in judged}
    chosen: dict[str, list[adaptive.Asked]] = {model: [] for model in p.models}
    while True:
        steps = {key: adaptive.ask(known, plan) for key, known in scores.items()}
        wanted = {key: runs for key, runs in steps.items() if not isinstance(runs, adaptive.Outcome)}
        if not wanted:
            break
        for (model, _), runs in wanted.items():
            chosen[model] += [run for run in runs if run not in chosen[model]]
        disk.write_json(study.folder / CHOSEN, chosen)
        study.pretrain()
        found = {}
        for task, metric in headlines.items():
            runs = results.mean_over_splits(results.select(evaluate(study, task), metric=metric, strategy="random"))
            found[task] = runs.groupby(["model", "percentage", "seed"])["value"].mean()  # over data sets
        for (model, task), runs in wanted.items():
            for percentage, seed in runs:
                scores[model, task][percentage].append(found[task][model, percentage, seed])
    columns = ["model", "task", "verdict", "percentage", "reason", "runs", "share"]
    rows = ((*key, end.verdict, end.percentage, end.reason, len(end.runs), end.share) for key, end in steps.items())
    return pd.DataFrame(sorted(rows, key=lambda row: row[:2]), columns=columns)


def panels(study: Study) -> pd.DataFrame:
    """How many genes the panels of random subsets have, by percentage: means over seeds; the first network is asked.

    Columns: genes, in_largest (how many the panel of the largest subset of the same seed has too), and for each
    evaluation data set how many it measures; empty if no network of the study has a panel, or no subset is random.
    """
    specs = (study.params.specs[name] for name in study.params.models)
    # To a model of the user's own, `n_genes` may mean anything.
    networks = (spec for spec in specs if not spec.is_external and getattr(spec.hyperparameters, "n_genes", None))
    if (network := next(networks, None)) is None:
        return pd.DataFrame()
    runs = [run for run in study.pretraining_runs() if (run.model, run.subset.strategy) == (network.name, "random")]
    largest, rows, measured = {}, [], {name: study.measured(name) for name in study.params.evaluation_sets()}
    for run in sorted(runs, key=lambda run: -run.subset.percentage):
        panel = study.model(run).genes
        shared = np.intersect1d(panel, largest.setdefault(run.subset.seed, panel))
        n_measured = {dataset: int(genes[panel].sum()) for dataset, genes in measured.items()}
        rows.append({"percentage": run.subset.percentage, "genes": len(panel), "in_largest": len(shared), **n_measured})
    return pd.DataFrame(rows).groupby("percentage").mean().round().astype(int) if rows else pd.DataFrame()


def _predictions(study: Study, task: str, dataset: str) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Columns of each model and baseline that is evaluated, and the labels it predicts of tested cells, by split.

    Splits are those by which scores are told: by cell, not by donor, where there are both.
    """
    for evaluation in evaluations(study, task):
        wanted = evaluation.dataset == dataset and getattr(evaluation.source, "budget", 1) == 1
        if wanted and (artifact := study.store.find(evaluation_unit(study, evaluation))):
            with np.load(artifact.folder / "predicted.npz", allow_pickle=False) as predicted:
                told = {split: predicted[split] for split in results.splits_by_cell(predicted)}
            yield study.columns_of(evaluation.source), told


def second_opinion(study: Study) -> pd.DataFrame:
    """Zero-shot predictions on held-out cells, by our labels, held against the authors', of the cells that have one.

    Columns: model, strategy, percentage, seed, n_cells (of the subset), ours and authors (share of the cells with the
    predicted type by either label) and judged (number of those cells); empty if none has labels.
    """
    held_out = study.params.held_out_name
    cells = study.dataset(held_out).obs["cell_type"].astype(str)
    theirs = curation.authors_labels(study, cells.index)
    rows, ours, judged = cells.index.get_indexer(theirs.index), cells.reindex(theirs.index), len(theirs)
    table = []
    for columns, predicted in _predictions(study, "zeroshot_classification", held_out) if judged else ():
        shares = [[(called[rows] == labels).mean() for labels in (ours, theirs)] for called in predicted.values()]
        by_ours, by_theirs = np.mean(shares, axis=0)
        table.append(columns | {"ours": by_ours, "authors": by_theirs, "judged": judged})
    return pd.DataFrame(table)


def right_cells(study: Study) -> pd.Series:
    """Which cells are named right, by neighbours or by a head: a share of the splits that test it for each tested cell.

    Arrays, (n_tested_cells,), by task, dataset, model, strategy, percentage and seed; for `results.against_baselines`.
    """
    right, keys = {}, ["model", "strategy", "percentage", "seed"]
    for task in sorted({"zeroshot_classification", "finetuned_classification"} & set(study.params.tasks)):
        for dataset in study.joined(task):
            if (obs := study.labels(dataset)) is None:
                continue  # nothing has been evaluated on it
            labels = obs["cell_type"].to_numpy().astype(str)
            for columns, predicted in _predictions(study, task, dataset):
                right[task, dataset, *(columns[key] for key in keys)] = _share_right(study, dataset, labels, predicted)
    index = pd.MultiIndex.from_tuples(right, names=["task", "dataset", *keys])
    return pd.Series(right, index=index, dtype=object).sort_index()


def _share_right(study: Study, dataset: str, labels: np.ndarray, predicted: dict[str, np.ndarray]) -> np.ndarray:
    n_right, n_tests = np.zeros((2, len(labels)))
    for split, called in predicted.items():
        cells = slice(None) if len(called) == len(labels) else _tested_cells(study, dataset)[split]
        n_right[cells] += called == labels[cells]
        n_tests[cells] += 1
    return (n_right / n_tests)[n_tests > 0]


@lru_cache(maxsize=1)
def _tested_cells(study: Study, dataset: str) -> dict[str, np.ndarray]:
    """Which cells each division of a large data set tests with heads: (n_cells,) bool, by the division's name."""
    parts = joining.three_parts(study.params, study.dataset(dataset).obs)
    return {split: part == tasks.finetuning.TEST for split, part in parts}


def summary(study: Study, *tasks_told: str) -> str:
    """How many models of how many subsets a study has, and what a notebook that tells of these tasks too leaves out."""
    strategies = {run.subset.strategy for run in study.pretraining_runs()}
    among = ", untrained ones among them," if "untrained" in strategies else ""
    lines = [f"{len(study.pretraining_runs())} models{among} of {len(study.subsets())} subsets"]
    lines += [f"left out: {told}" for name, told in LEFT_OUT.items() if name not in strategies]
    lines += [f"left out: what {task} tells" for task in tasks_told if task not in study.params.tasks]
    return "\n".join(lines)


def extremes(study: Study, table: pd.DataFrame, metric: str) -> dict[str, Run]:
    """The pretrained run with the best and the worst score on the first data set, and the best one's untrained control.

    They are by title, for pictures of their embeddings; none if no model is pretrained. `table` is of one task.
    """
    first = study.first_dataset(table["task"].iloc[0])
    means = results.mean_over_splits(results.select(table, metric=metric, dataset=first))
    scores = results.sign_of(metric) * means.set_index(["model", "strategy", "percentage", "seed"])["value"]
    runs = {(run.model, *asdict(run.subset).values()): run for run in study.pretraining_runs()}
    scores = scores[scores.index.isin([key for key, run in runs.items() if not run.subset.untrained])]
    if scores.empty:
        return {}
    titled = {"best": runs[scores.idxmax()], "worst": runs[scores.idxmin()]}
    chosen = {f"{kind}: {run.model}, {run.subset.percentage:g} %": run for kind, run in titled.items()}
    controls = [run for run in runs.values() if run.model == titled["best"].model and run.subset.untrained]
    return chosen | {f"untrained: {run.model}": run for run in controls[:1]}


def levers(study: Study) -> pd.DataFrame:
    """Scores of all pretrained runs beside what was varied in them, for `walls`; a mean over splits a row.

    Columns: model (without its label: of `SSL@2x`, SSL), family, label, strategy, seed, n_cells, samples (cells seen in
    training, with repeats), varied, cells, depth, steps and width (multiples of the reference, which is the whole
    corpus with the settings and steps of the model without its label), task, dataset, metric, value. `varied` is empty
    for random subsets with no other setting, whatever their steps; else `width`, `weight_decay`, `depth` or `strategy`,
    or `several`. To layers that are not all wider alike no one width can be told: they are `several`.
    """
    specs, tables = study.params.specs, []
    for name in ("results", "budgets"):
        if (study.folder / f"{name}.parquet").is_file():  # where no run has another budget, there may be but one
            rows = results.read_results(study.folder, name)
            rows = rows[(rows["percentage"] > 0) & rows["model"].isin(specs)]  # no baseline, nor a given embedding
            means = results.mean_over_splits(rows)
            tables += [means.assign(steps=means.get("budget", 1.0))] if len(means) else []
    if not tables:
        return pd.DataFrame(columns=LEVERS)
    table = pd.concat(tables, ignore_index=True).rename(columns={"model": "label"})
    settings = pd.DataFrame([_setting(study, label) for label in table["label"].unique()]).set_index("label")
    table = table.join(settings, on="label")
    table["samples"] = table["samples"] * table["steps"]
    table["steps"] *= table["longer"]
    table["cells"] = table["percentage"] / 100
    table["depth"] = table["strategy"].map(lambda name: STRATEGIES[name].depth)
    by_strategy = np.where(table["depth"] < 1, "depth", np.where(table["strategy"] == "random", "", "strategy"))
    both = (table["varied"] != "") & (by_strategy != "")
    table["varied"] = np.where(both, "several", table["varied"] + by_strategy)
    return table[LEVERS]


def _setting(study: Study, label: str) -> dict[str, Any]:
    """What sets a labelled model apart from the one without its label."""
    p, base = study.params, hyperparameters.without_label(label)
    spec, own = p.specs[label], hyperparameters.resolve(base, p.hyperparameters, schedule=p.budget)
    values, own_values = (each.hyperparameters.model_dump() for each in (spec, own))
    differ = {name for name in values if values[name] != own_values[name]}
    varied, width = "".join(differ) if differ <= {"weight_decay"} else "several", 1.0
    if differ & {"n_hidden", "n_embd"}:
        layers, own_layers = (np.ravel(each.get("n_hidden") or each["n_embd"]) for each in (values, own_values))
        if len(layers) == len(own_layers) and np.ptp(wider := layers / own_layers) == 0:
            width = float(wider[0])
            varied = "width" if differ <= {"n_hidden", "n_latent", "n_embd", "learning_rate"} else varied
    samples, longer = p.steps_of(label) * study.costs.batch_size(label), p.steps_of(label) / p.steps_of(base)
    told = {"label": label, "model": base, "family": spec.family, "varied": varied, "samples": samples}
    return told | {"width": width, "longer": longer}
