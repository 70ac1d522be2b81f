"""One training loop for every model: its budget, schedule and patience are counted in optimiser steps.

Counting in steps, never in passes over the data, is what makes a subset of 1 % and the full corpus differ in data
alone. All randomness of a step (dropout, masks, latent noise) follows from the seed and the step's number, and so
do its cells: a run that is killed and resumed ends, on a CPU, with the same bits as one that never was. (A GPU adds up
in another order each time.)
Needs torch, numpy and tqdm only, so that it runs on a machine that has little else.
"""

import copy
import itertools
import logging
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datawall.engine import disk

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS = 60  # between two checkpoints
LOSSES_AT_ONCE = {"cpu": 1, "cuda": 20}  # steps a device runs ahead before their losses are looked at
NEIGHBOURS = 64  # cells that a pass over many draws together: what a disk gives in one go
MIXED = 32_768  # cells whose order is fully random

type Forward = Callable[..., Any]
type LossOf = Callable[[Forward, Any, int], Tensor | tuple[Tensor, int]]
type Shares = Iterator[tuple[int, np.ndarray]]  # steps, and the rows of this process
type Load = Callable[[Shares], Iterator[Any]]


@dataclass(frozen=True)
class Recipe:
    """How to train: the budget, the optimiser and the learning rate's course."""

    steps: int
    batch_size: int  # cells a step, over all processes
    learning_rate: float  # at its peak, after warm-up
    warmup: float = 0.0  # share of the steps, 0 to 1, in which the rate rises from zero
    decay: Literal["linear", "cosine", "stepwise", "none"] = "linear"  # after warm-up; the first two end at zero
    decay_every: float = 1.0  # stepwise: steps after each of which the rate is multiplied by 0.9
    optimiser: Literal["AdamW", "Adam"] = "AdamW"
    epsilon: float = 1e-8  # of the optimiser
    weight_decay: float = 0.0  # on matrices
    decay_vectors: bool = False  # whether on biases and normalisation weights too
    clip_norm: float | None = None  # longest gradient, over all weights
    validate_every: int = 100  # steps between two looks at the validation loss
    patience: int | None = None  # stop after this many looks without a lower validation loss

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rising = self.warmup * self.steps
        if step < rising:
            return self.learning_rate * (step + 1) / (rising + 1)
        if self.decay == "stepwise":
            return self.learning_rate * 0.9 ** int((step - rising) // self.decay_every)
        left = (self.steps - step) / (self.steps - rising)
        course = {"linear": left, "cosine": (1 - np.cos(np.pi * left)) / 2, "none": 1.0}
        return self.learning_rate * course[self.decay]


@dataclass(frozen=True)
class History:
    """What happened: one entry a step, and the totals to compare runs by."""

    loss: np.ndarray  # (n_steps,) training loss in the model's own units
    learning_rate: np.ndarray  # (n_steps,)
    validation_step: np.ndarray  # (n_looks,) steps taken before each look
    validation_loss: np.ndarray  # (n_looks,)
    samples_seen: int  # cells drawn, repeats counted
    unique_cells: int  # different cells among them
    seconds: float = 0.0  # of the steps that were timed: of a run that was resumed, those since
    n_timed: int = 0  # cells of these steps, over all processes, and what their losses are means of:
    n_averaged: int = 0  # these cells, or such as hidden tokens
    n_processes: int = 1


class NonFiniteLossError(FloatingPointError):
    """The loss became NaN or infinite; the message says at which step."""


def device() -> torch.device:
    """A CUDA GPU when there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def send(tensor: Tensor, where: torch.device | str | None = None) -> Tensor:
    """A tensor of the CPU on a device, or else on `device()`, which is not waited for."""
    where = device() if where is None else torch.device(where)
    return tensor.pin_memory().to(where, non_blocking=True) if where.type == "cuda" else tensor.to(where)


def minibatches(cells: int | np.ndarray, batch_size: int, steps: int, *, seed: int) -> Iterator[np.ndarray]:
    """Rows of each step's batch, (batch_size,) int64: shuffled passes over the cells, laid end to end and cut.

    No cell is dropped at the end of a pass, and a batch larger than the data holds repeats. A pass over more than
    32,768 cells is shuffled so that it can be read from a disk: blocks of 64 neighbours in random order, and cells
    within the 32,768 that come one after the other, which are those of `batches_together` batches. `cells` are their
    rows, or the number of them; ValueError if there are none.
    """
    cells = np.arange(cells) if isinstance(cells, int) else cells
    if not len(cells):
        raise ValueError("there are no cells to draw batches from.")
    rng = np.random.default_rng(seed)
    together = batch_size * batches_together(batch_size)
    n_drawn, waiting = 0, np.empty(0, np.int64)
    for _ in range(steps):
        while len(waiting) < batch_size:
            cuts = np.arange(-n_drawn % together, len(cells), together)
            waiting = np.concatenate([waiting, _shuffled(cells, rng, cuts)])
            n_drawn += len(cells)
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def batches_together(batch_size: int) -> int:
    """Batches that have their cells from the same blocks: to be read from a disk at once."""
    return max(1, MIXED // batch_size)


def _shuffled(cells: np.ndarray, rng: np.random.Generator, cuts: np.ndarray) -> np.ndarray:
    """Cells in random order; of many, within the parts into which `cuts` divides them."""
    if len(cells) <= MIXED:
        return rng.permutation(cells)
    blocks = rng.permutation(-(-len(cells) // NEIGHBOURS))
    places = (blocks[:, None] * NEIGHBOURS + np.arange(NEIGHBOURS)).ravel()
    order = np.sort(cells)[places[places < len(cells)]]
    for part in np.split(order, cuts):
        rng.shuffle(part)  # a view
    return order


def train(
    module: nn.Module,
    loss_of: LossOf,
    n_cells: int,
    recipe: Recipe,
    *,
    seed: int,
    batches: Iterable[np.ndarray] | None = None,
    load: Load | None = None,
    validation_loss: Callable[[], float] | None = None,
    checkpoint: Path | None = None,
) -> History:
    """Train a module in place, with a bar where stderr is a terminal.

    Under `torchrun` each process takes its share of every batch, and gradients are averaged with the weight of what
    each process's loss is a mean of. So the result is that of one process with the same recipe, up to rounding, but
    for what a process draws for itself (masks, noise, dropout) and the batch statistics of batch normalisation.

    Raises NonFiniteLossError at the first loss that is NaN or infinite, ValueError if the checkpoint is of another run.

    Parameters
    ----------
    module
        On its device; left in evaluation mode. With `validation_loss`, it ends with the weights of its lowest.
    loss_of
        Loss of a step from `forward` (the module, or what runs it in several processes), the rows of the batch, or
        what `load` made of them, and the number of the step, from 0. A scalar tensor, the mean over the cells; or a
        pair of it and of the number of other things that it is the mean of. Random by torch's global generator alone.
    n_cells
        Cells that rows are drawn from.
    batches
        Rows of each step's batch; `minibatches` by default.
    load
        From the numbers of the steps to take and the rows of this process's shares, what `loss_of` is given of each;
        it may look ahead.
    validation_loss
        Looked at every `recipe.validate_every` steps and at the end.
    checkpoint
        An `.npz` file, written about once a minute, and resumed from where it exists.
    """
    weights = list(module.parameters())
    where = weights[0].device
    rank, n_processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    forward = DistributedDataParallel(module) if n_processes > 1 else module
    optimiser = _optimiser(module, recipe)
    state = _State(module, optimiser, f"{recipe} seed={seed} n_cells={n_cells}")
    if checkpoint:
        state.resume(checkpoint)
    if batches is None:
        batches = minibatches(n_cells, recipe.batch_size, recipe.steps, seed=seed)
    begun = len(state.losses)  # steps of before the run was resumed
    taken: deque[tuple[int, np.ndarray]] = deque()  # by `load`, which may be ahead, and not used yet
    drawn = np.zeros(0, bool)  # whether each row was: a byte a cell, whatever the number of steps

    def shares() -> Shares:
        nonlocal drawn
        for step, rows in enumerate(itertools.islice(batches, recipe.steps)):
            if (n_more := int(rows.max()) + 1 - len(drawn)) > 0:
                drawn = np.pad(drawn, (0, n_more))
            drawn[rows] = True
            if step >= begun:
                taken.append((step, rows))
                yield step, rows[rank::n_processes]

    module.train()
    shown = None if rank == 0 else True  # None: where stderr is a terminal
    bar = tqdm(total=recipe.steps, initial=begun, desc="training", disable=shown, leave=False)
    # Not `torch.manual_seed`: it also queues a call for GPUs that are not there, with a traceback, at every step.
    generators = [torch.default_generator]  # of a GPU's run too: masks are drawn on the CPU
    if where.type == "cuda":
        generators.append(torch.cuda.default_generators[where.index or 0])
    pending: list[tuple[int, np.ndarray, Tensor]] = []
    n_averaged_in_all, started = 0, time.monotonic()
    saved = started
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), bar:
        for cells in load(shares()) if load else (rows for _, rows in shares()):
            step, rows = taken.popleft()
            step_seed = int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0])
            for generator in generators:
                generator.manual_seed(step_seed)
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate(step)
            with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
                loss = loss_of(forward, cells, step)
            loss, n_averaged = loss if isinstance(loss, tuple) else (loss, len(rows[rank::n_processes]))
            n_averaged_in_all += n_averaged * n_processes
            if n_processes > 1:  # a process weighs as much as what its loss is a mean of; 1 on average
                total = torch.full((), float(n_averaged), device=where)
                dist.all_reduce(total)
                loss = loss * (n_averaged * n_processes / total)
            pending.append((step, rows, loss.detach()))
            last = step + 1 == recipe.steps
            look = validation_loss and (last or (step + 1) % recipe.validate_every == 0)
            # All processes look together, so that clocks have no say in when: one alone would wait for the others.
            settle = look or last or len(pending) == LOSSES_AT_ONCE[where.type]
            save = settle and checkpoint and rank == 0 and time.monotonic() - saved >= CHECKPOINT_SECONDS
            if settle:
                _settle(pending, state, recipe, n_processes)
                bar.set_postfix(loss=f"{state.losses[-1]:.3f}", refresh=False)
            for weight in weights:
                weight.grad = None
            loss.backward()
            if recipe.clip_norm is not None:
                nn.utils.clip_grad_norm_(weights, recipe.clip_norm)
            optimiser.step()
            bar.update()
            if look:
                state.look(step + 1, validation_loss)
                if recipe.patience is not None and len(state.looks) - state.best_look >= recipe.patience:
                    break
            if save:
                state.write(checkpoint)
                saved = time.monotonic()
    if state.best_weights is not None:
        module.load_state_dict(state.best_weights)
    module.eval()
    return History(
        loss=np.array(state.losses),
        learning_rate=np.array([recipe.rate(step) for step in range(len(state.losses))]),
        validation_step=np.array([step for step, _ in state.looks], dtype=np.int64),
        validation_loss=np.array([value for _, value in state.looks]),
        samples_seen=len(state.losses) * recipe.batch_size,
        unique_cells=int(drawn.sum()),
        seconds=time.monotonic() - started,
        n_timed=(len(state.losses) - begun) * recipe.batch_size,
        n_averaged=n_averaged_in_all,
        n_processes=n_processes,
    )


def _optimiser(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over a module's weights."""
    by_decay: dict[float, list[nn.Parameter]] = {}
    for weight in module.parameters():
        decays = weight.ndim > 1 or recipe.decay_vectors
        by_decay.setdefault(recipe.weight_decay if decays else 0.0, []).append(weight)
    groups = [{"params": weights, "weight_decay": decay} for decay, weights in by_decay.items()]
    return getattr(torch.optim, recipe.optimiser)(groups, eps=recipe.epsilon, fused=True)


class _State:
    """What a run must remember to be resumed, in one `.npz` without pickles; all else follows from the step."""

    def __init__(self, module: nn.Module, optimiser: torch.optim.Optimizer, identity: str) -> None:
        self.module, self.optimiser, self.identity = module, optimiser, identity
        self.losses: list[float] = []
        self.looks: list[tuple[int, float]] = []
        self.best, self.best_look = np.inf, 0
        self.best_weights: dict[str, Tensor] | None = None

    @torch.no_grad()
    def look(self, step: int, validation_loss: Callable[[], float]) -> None:
        """Note the validation loss in evaluation mode, and the weights if it is the lowest."""
        self.module.eval()
        value = float(validation_loss())
        self.module.train()
        self.looks.append((step, value))
        if value < self.best:
            self.best, self.best_look = value, len(self.looks)
            self.best_weights = copy.deepcopy(self.module.state_dict())

    def write(self, path: Path) -> None:
        """Write the state atomically."""
        parts = {"weight": self.module.state_dict(), "best": self.best_weights or {}}
        parts |= {f"optimiser/{i}": moments for i, moments in self.optimiser.state_dict()["state"].items()}
        arrays = {f"{part}/{name}": x.cpu().numpy() for part, values in parts.items() for name, x in values.items()}
        looks = np.array(self.looks, dtype=np.float64).reshape(-1, 2)
        arrays |= {"identity": self.identity, "losses": self.losses, "looks": looks}
        arrays["best"] = [self.best, self.best_look]
        disk.write_atomically(path, lambda scratch: np.savez(scratch, **arrays))

    def resume(self, path: Path) -> None:
        """Take up the state of a checkpoint, if there is a sound one; one of another run is refused."""
        if not path.exists():
            return
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
                arrays = dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            log.warning("the checkpoint %s is damaged (%s); training starts again.", path, error)
            return
        if str(arrays["identity"]) != self.identity:
            raise ValueError(f"{path} is a checkpoint of another run ({arrays['identity']}); remove it to start again.")
        parts: dict[str, dict[str, Tensor]] = {"weight": {}, "best": {}}
        for part, slash, name in (key.rpartition("/") for key in arrays):
            if slash:
                parts.setdefault(part, {})[name] = torch.from_numpy(arrays[f"{part}/{name}"])
        self.module.load_state_dict(parts.pop("weight"))
        self.best_weights = parts.pop("best") or None
        moments = {int(part.removeprefix("optimiser/")): values for part, values in parts.items()}
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})
        self.losses = arrays["losses"].tolist()
        self.looks = [(int(step), value) for step, value in arrays["looks"].tolist()]
        self.best, self.best_look = float(arrays["best"][0]), int(arrays["best"][1])


def _settle(pending: list[tuple[int, np.ndarray, Tensor]], state: _State, recipe: Recipe, n_processes: int) -> None:
    """Move waiting losses into the history, averaged over processes; stop at one that is not finite."""
    losses = torch.stack([loss for _, _, loss in pending]).double()
    if n_processes > 1:
        dist.all_reduce(losses)
    for (step, rows, _), loss in zip(pending, (losses / n_processes).tolist(), strict=True):
        if not np.isfinite(loss):
            later = pending[-1][0] - step
            remedy = "Lower the learning rate or lengthen the warm-up."
            if all(weight.isfinite().all() for weight in state.module.parameters()):
                cause = "the weights are finite, so the cause is in these cells, or the learning rate is too high."
            elif later:  # which have spoiled the weights, whatever the cause
                cause = f"seen {later} steps later: the cause is in these cells, or training diverged. {remedy}"
            else:
                cause = f"the weights are no longer finite: training diverged. {remedy}"
            cells = ", ".join(str(row) for row in rows[:5])
            raise NonFiniteLossError(
                f"the loss is {loss} at step {step + 1} of {recipe.steps}, learning rate {recipe.rate(step):.2g}, on "
                f"the batch of cells {cells}, … (rows of the subset); {cause}"
            )
        state.losses.append(loss)
    pending.clear()


def seeded[Module: nn.Module](build: Callable[[], Module], seed: int) -> Module:
    """A module with initial weights drawn from a seed, on the device; the global random state stays as it is."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        return build().to(device())
