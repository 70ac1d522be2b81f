"""One model of a study in several processes, one per GPU: what `torchrun` starts in each of them."""

import argparse
import ctypes
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from datawall.study.records import Run, Subset
from datawall.study.study import Study, open_study

END_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main() -> None:
    """Pretrain one model of a study in several processes; `run_all.py` then finds it made."""
    parser = argparse.ArgumentParser("torchrun --nproc-per-node 2 -m datawall.study.together", description=main.__doc__)
    parser.add_argument("study", help="study file, or the name of one in params/")
    for name, kind in {"model": str, "strategy": str, "percentage": float, "seed": int}.items():
        parser.add_argument(name, type=kind)
    parser.add_argument("--budget", type=float, default=1.0, help="share of the model's steps")
    parser.add_argument("--out", type=Path, help="run folder; the study's own by default")
    options = parser.parse_args()
    if together := "RANK" in os.environ:
        if sys.platform == "linux":  # torchrun starts sessions of their own, which would outlive it and hold their GPUs
            ctypes.CDLL(None).prctl(END_WITH_PARENT, signal.SIGKILL)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    study = open_study(options.study)
    study = Study(study.params, options.out or study.folder)
    run = Run(options.model, Subset(options.strategy, options.percentage, options.seed), options.budget)
    if run not in study.all_runs():
        raise SystemExit(f"{options.study} has no such run: {run}")
    first = not together or dist.get_rank() == 0
    if not first:
        dist.barrier()  # the first process makes the corpus and the subset, and stores the model
    study.rows(run.subset)
    made = study.store.find(study.model_unit(run))
    if first and together:
        dist.barrier()
    if first:
        study.model_artifact(run, together=False)
    elif not made:
        with tempfile.TemporaryDirectory() as folder:
            study.make_model(run, Path(folder))
    if together:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
