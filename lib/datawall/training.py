"""One training loop for every model: its budget, schedule and patience are counted in optimiser steps.

Counting in steps, never in passes over the data, is what makes a subset of 1 % and the full corpus differ in data
alone. Imports torch and numpy only (and tqdm for the bar), so that it runs on a machine that has little else.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm


@dataclass(frozen=True)
class Recipe:
    """How to train: the budget and the optimiser (AdamW, linear warm-up, then linear decay to zero)."""

    steps: int
    batch_size: int  # cells a step
    learning_rate: float  # at its peak, after warm-up
    warmup: float = 0.0  # share of the steps, 0 to 1, in which the rate rises from zero
    decay: bool = True  # whether the rate then falls to zero at the last step
    weight_decay: float = 0.0  # on matrices; biases and normalisation weights are left alone
    validate_every: int = 100  # steps between two looks at the validation loss
    patience: int | None = None  # stop after this many looks without a lower validation loss

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rising = self.warmup * self.steps
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        return self.learning_rate * ((self.steps - step) / (self.steps - rising) if self.decay else 1.0)


@dataclass(frozen=True)
class History:
    """What happened: one entry a step, and the totals to compare runs by."""

    loss: np.ndarray  # (n_steps,) training loss in the model's own units
    learning_rate: np.ndarray  # (n_steps,)
    validation_step: np.ndarray  # (n_looks,) steps taken before each look
    validation_loss: np.ndarray  # (n_looks,)
    samples_seen: int  # cells drawn, repeats counted
    unique_cells: int  # cells there were to draw

    @property
    def passes(self) -> float:
        """How often each cell was seen, on average."""
        return self.samples_seen / self.unique_cells


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite; the message says at which step."""


def device() -> torch.device:
    """A CUDA GPU when there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def minibatches(n_cells: int, batch_size: int, steps: int, *, seed: int) -> Iterator[np.ndarray]:
    """Rows of each step's batch: shuffled passes over the cells, laid end to end and cut into batches.

    No cell is dropped at the end of a pass, and a batch larger than the data holds repeats.

    Parameters
    ----------
    n_cells, batch_size, steps
        Sizes; all positive.
    seed
        Of the order.

    Yields
    ------
    rows (batch_size,) int64.

    Raises
    ------
    ValueError
        If there are no cells.
    """
    if n_cells < 1:
        raise ValueError("there are no cells to draw batches from.")
    rng = np.random.default_rng(seed)
    waiting = np.empty(0, np.int64)
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting = np.concatenate([waiting, rng.permutation(n_cells)])
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def train(
    module: nn.Module,
    loss_of: Callable[[np.ndarray], Tensor],
    n_cells: int,
    recipe: Recipe,
    *,
    seed: int,
    validation_loss: Callable[[], float] | None = None,
    progress: str | None = None,
) -> History:
    """Train a module in place.

    Parameters
    ----------
    module
        On its device; left in evaluation mode. With `validation_loss`, it ends with the weights of its lowest.
    loss_of
        Loss, a scalar tensor, of a batch of cells given by their rows.
    n_cells
        Cells that rows are drawn from.
    recipe
        Budget and optimiser.
    seed
        Of the order of cells and of dropout.
    validation_loss
        Looked at every `recipe.validate_every` steps and at the end.
    progress
        Label of a progress bar; none is shown without.

    Returns
    -------
    the history.

    Raises
    ------
    NonFiniteLossError
        At the first loss that is NaN or infinite.
    """
    where = next(module.parameters()).device
    matrices = [weight for weight in module.parameters() if weight.ndim > 1]
    vectors = [weight for weight in module.parameters() if weight.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        fused=True,
    )
    losses, looks = [], []
    best, best_look, best_weights = np.inf, 0, None
    module.train()
    bar = tqdm(total=recipe.steps, desc=progress, disable=progress is None, leave=False)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), bar:
        torch.manual_seed(seed)
        for step, rows in enumerate(minibatches(n_cells, recipe.batch_size, recipe.steps, seed=seed)):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step)
            with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
                loss = loss_of(rows)
            losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise NonFiniteLossError(
                    f"the loss is {losses[-1]} at step {step + 1} of {recipe.steps}, learning rate "
                    f"{recipe.rate(step):.2g}; lower the learning rate or lengthen the warm-up."
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
            last = step + 1 == recipe.steps
            if validation_loss and (last or (step + 1) % recipe.validate_every == 0):
                looks.append((step + 1, _look(module, validation_loss)))
                if looks[-1][1] < best:
                    best, best_look = looks[-1][1], len(looks)
                    best_weights = copy.deepcopy(module.state_dict())
                if recipe.patience is not None and len(looks) - best_look >= recipe.patience:
                    break
    if best_weights is not None:
        module.load_state_dict(best_weights)
    module.eval()
    return History(
        loss=np.array(losses),
        learning_rate=np.array([recipe.rate(step) for step in range(len(losses))]),
        validation_step=np.array([step for step, _ in looks], dtype=np.int64),
        validation_loss=np.array([value for _, value in looks]),
        samples_seen=len(losses) * recipe.batch_size,
        unique_cells=n_cells,
    )


@torch.no_grad()
def _look(module: nn.Module, validation_loss: Callable[[], float]) -> float:
    """The validation loss in evaluation mode; the module returns to training."""
    module.eval()
    value = float(validation_loss())
    module.train()
    return value


class Head(nn.Sequential):
    """The small network on top of a frozen embedding: Linear, ReLU, dropout 0.2, Linear (original study: 128 wide)."""

    def __init__(self, n_inputs: int, n_outputs: int, *, n_hidden: int = 128, dropout: float = 0.2) -> None:
        super().__init__(nn.Linear(n_inputs, n_hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(n_hidden, n_outputs))


def seeded[Module: nn.Module](build: Callable[[], Module], seed: int) -> Module:
    """A module with initial weights drawn from a seed, on the device; the global random state is left as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return build().to(device())
