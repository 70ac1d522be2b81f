"""The plan of a study beside what its run folder says was measured, by stage and by kind of unit.

    python run_all.py params/quick.yaml --calibrate
    python tests/benchmarks/plan.py runs/quick

A stage's measured time is that by the clock from the begin of its first unit to the end of its last, so the folder must
have been made in one go, by as many workers as this machine has. What is told of units is their sum: each unit's time
by the clock, with the first of a process importing what it needs. What notebooks do beside is in neither column.

On 2 cores of an Intel Xeon, for params/quick.yaml: 421 s predicted and 407 s measured, -34 % (zero-shot classification)
to +18 % (pretraining) by stage.
"""

import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

import numpy as np

import datawall as dw
from datawall.engine import store
from datawall.planning import plan as planning
from datawall.reading import report
from datawall.study import costs
from datawall.study.records import Run

CURATION = ("corpus", "dataset", "contamination", "split", "subset", "sketch")
MARGIN = 0.3

study = dw.open_study(sys.argv[1])
known = costs.calibration_of(study.params.study)
made = store.read_all(Path(sys.argv[1]) / "store").values()
n_workers = planning.workers(study)
print(f"calibrated for {known['study']} on {known['machine']}; {n_workers} workers")


def stage_of(one):
    """The stage in which an artifact is made, if it is a unit of one."""
    if one.kind == "evaluation":
        return one.record["task"]
    return {"model": "pretraining", **dict.fromkeys(CURATION, "curation")}.get(one.kind)


def line(what, predicted, measured):
    off = predicted / measured - 1
    beyond = "" if abs(off) <= MARGIN else f"  beyond {MARGIN:.0%}"
    print(f"{what:40}{predicted:>10.0f} s{measured:>10.0f} s{off:>+9.0%}{beyond}")


print(f"\n{'stage, by the clock':40}{'predicted':>12}{'measured':>12}")
totals = np.zeros(2)
for stage in planning.stages(study):
    units = [one.made for one in made if stage_of(one) == stage.name]
    if units:
        ends = np.array([datetime.fromisoformat(unit["ended"]).timestamp() for unit in units])
        begins = ends - [unit["seconds"] for unit in units]
        both = stage.computing_seconds(n_workers), ends.max() - begins.min()
        line(stage.name, *both)
        totals += both
line("all", *totals)

print(f"\n{'units, one after the other':40}{'predicted':>12}{'measured':>12}")
predicted, embedded = Counter(), set()
for run in study.pretraining_runs():
    predicted[f"model: {study.params.specs[run.model].family}"] += study.costs.run(run).seconds
for task in study.params.tasks:
    for one in dw.evaluation.evaluations(study, task):
        which = one.source, one.dataset
        seconds = study.costs.evaluation(one, embedded=which in embedded).seconds
        predicted[f"evaluation: {dw.titles.label(task)}"] += seconds
        if isinstance(one.source, Run) and task != "reconstruction":
            embedded.add(which)
measured = report.costs(made).set_index("made")["time, all"]
for label, seconds in predicted.items():
    line(label, seconds, measured[label])
