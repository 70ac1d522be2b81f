"""One model of a study in several processes, one per GPU: what `torchrun` starts in each of them."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from datawall.study.study import Study, open_study
from datawall.study.units import Run, Subset


def main(arguments: list[str] | None = None) -> None:
    """Pretrain one model of a study in several processes; `run_all.py` then finds it made."""
    parser = argparse.ArgumentParser(
        prog="torchrun --nproc-per-node 2 -m datawall.study.together", description=main.__doc__.splitlines()[0]
    )
    parser.add_argument("study", help="study file, or the name of one in params/")
    parser.add_argument("model")
    parser.add_argument("strategy")
    parser.add_argument("percentage", type=float)
    parser.add_argument("seed", type=int)
    parser.add_argument("--budget", type=float, default=1.0, help="share of the model's steps")
    parser.add_argument("--out", type=Path, help="run folder; the study's own by default")
    options = parser.parse_args(arguments)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    study = open_study(options.study)
    study = Study(study.params, options.out or study.folder)
    run = Run(options.model, Subset(options.strategy, options.percentage, options.seed), options.budget)
    if run not in study.all_runs():
        raise SystemExit(f"{options.study} has no such run: {run}")
    study.pretrain_together(run)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
