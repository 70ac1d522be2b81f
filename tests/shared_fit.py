"""Train a small network in one process, or in several under torchrun: shared_fit.py FOLDER"""

import os
import sys

import numpy as np
import torch
import torch.distributed as dist

from datawall import training

if "RANK" in os.environ:
    dist.init_process_group("gloo")
rng = np.random.default_rng(0)
X = torch.from_numpy(rng.standard_normal((60, 5)).astype(np.float32))
y = X @ torch.arange(5.0)[:, None]
module = training.seeded(lambda: training.Head(5, 1, n_hidden=16, dropout=0), 0)
recipe = training.Recipe(steps=30, batch_size=16, learning_rate=1e-2, clip_norm=1.0)
history = training.train(
    module,
    lambda forward, rows, step: ((forward(X[rows]) - y[rows]) ** 2).mean(),
    60,
    recipe,
    seed=0,
    validation_loss=lambda: ((module(X) - y) ** 2).mean(),
)
if not dist.is_initialized() or dist.get_rank() == 0:
    weights = {name: weight.numpy() for name, weight in module.state_dict().items()}
    np.savez(sys.argv[1], loss=history.loss, **weights)
if dist.is_initialized():
    dist.destroy_process_group()
