"""A study, as people hold it: opened by the name of its file, with all that is made of it (see `Study`)."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pandas as pd

from datawall.engine import disk, paths
from datawall.study import joining, params
from datawall.study.embedding import WithEmbeddings

log = logging.getLogger(__name__)


class Study(WithEmbeddings):
    """A study and its run folder. What it has of a kind of unit is in the file of that kind.

    They build on one another, each a file and a class: `corpus`, `dataset` (the split and what data sets share with the
    corpus, too), `subset` (and the sketch), `model`, `embedding` (and layouts). `evaluation` stands beside this class.
    """

    tabulated: tuple[list[str], pd.DataFrame] | None = None  # keys of evaluations, and their results, as last written

    @property
    def opening(self) -> tuple[Callable[[str, str], Self], str, str]:
        """By which another process opens it: a function, and its arguments."""
        return _reopen, self.params.model_dump_json(), str(self.folder)

    def write_params(self) -> None:
        """Write the study, complete with defaults, into its run folder, where it can be opened again."""
        disk.write_text(self.folder / "study.yaml", params.to_yaml(self.params.model_dump()))

    # Which data sets a task is judged on

    def first_dataset(self, task: str) -> str:
        """The data set by which a task is told: the held-out cells or, if they do not join it, the first that does."""
        return next(iter(self.joined(task)), self.params.held_out_name)

    def joined(self, task: str) -> list[str]:
        """Data sets that a task is judged on; until they have been read, all whose columns allow it."""
        sets, apart = self.params.evaluation_sets(), self.not_judged(task)
        return [name for name, dataset in sets.items() if dataset.joins(task) and name not in apart]

    def not_judged(self, task: str) -> dict[str, str]:
        """Data sets, read before, whose columns allow a task and whose cells do not, and why."""
        sets = {name: dataset for name, dataset in self.params.evaluation_sets().items() if dataset.joins(task)}
        read = {name: obs for name in sets if (obs := self.labels(name)) is not None}
        why = {name: joining.unfit(task, obs, sets[name], self.params) for name, obs in read.items()}
        return {name: reason for name, reason in why.items() if reason}


def open_study(study: str, **overrides: Any) -> Study:
    """Open a study by name (`quick`), by the path of its file, or by the folder of an earlier run.

    Overrides, such as a notebook's own parameters, replace values of the study file. Raises FileNotFoundError if there
    is no such study, ParamsError if the study file or an override is wrong. Where they differ from the file, a warning
    says so, as the tables of its run folder will be of other runs.
    """
    path = paths.study_file(study)
    own = params.read(path)
    checked = params.read(path, overrides) if overrides else own
    if differ := [name for name in overrides if getattr(checked, name) != getattr(own, name)]:
        what = "not those of the study file; the tables in its run folder are written anew with these"
        log.warning("%s: the values of %s are %s.", study, ", ".join(differ), what)
    return Study(checked, paths.run_folder(path, checked.study))


def _reopen(params_json: str, folder: str) -> Study:
    return Study(params.Params.model_validate_json(params_json), Path(folder))
