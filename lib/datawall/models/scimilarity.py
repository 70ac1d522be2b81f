"""SCimilarity: an autoencoder shaped by cell-type labels, after Heimberg et al. (2025, Nature 638:1085)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datawall import models
from datawall.cells.ontology import read as read_ontology
from datawall.engine import paths
from datawall.models import base, training
from datawall.models.sparse import Cells, DenseCells, Reconstruction, SparseLinear, SparseNetwork, bernoulli, on_device

LABEL = "cell_type"
STUDIES = ("dataset_id", "batch")  # the first of these columns with two values tells studies apart


class TripletAutoencoder(nn.Module):
    """Linear layers, batch normalisation, PReLU and dropout; its forward pass gives the loss of a batch."""

    def __init__(self, n_genes: int, h: models.hyperparameters.SCimilarity) -> None:
        super().__init__()
        self.h = h

        def layers(*linears: nn.Module) -> list[nn.Module]:
            parts = (
                (nn.Dropout(h.dropout), linear, nn.BatchNorm1d(len(linear.bias)), nn.PReLU()) for linear in linears
            )
            return [*chain(*parts)][1:]  # what comes first is the input, or the latent space: no such dropout

        widths, back = h.n_hidden, h.n_hidden[::-1]
        sparse, dense = SparseLinear(n_genes, widths[0]), map(nn.Linear, widths, widths[1:])
        self.encoder = nn.Sequential(*layers(sparse, *dense), nn.Linear(widths[-1], h.n_latent))
        self.decoder = nn.Sequential(*layers(*map(nn.Linear, [h.n_latent, *back], back)))
        self.reconstruction = Reconstruction(widths[0], n_genes)

    def forward(
        self, cells: Cells | DenseCells, anchor: Tensor, positive: Tensor, negatives: Tensor, rate: float
    ) -> Tensor:
        h, seen = self.h, cells
        if self.training and h.input_dropout:  # it leaves zeros zero, so that only the other values need be drawn for
            kept = bernoulli(len(cells.data), 1 - h.input_dropout, cells.data.device)
            seen = cells.thinned(kept, 1 / (1 - h.input_dropout))
        latent = self.encode(seen)  # (B, L)
        loss = (1 - h.triplet_weight) * self.reconstruction(self.decoder(latent), cells)
        weight = self.encoder[0 if h.l1_layer == "first" else -1].weight
        loss = loss + h.l1 * rate * torch.linalg.vector_norm(weight, 1, dim=1).sum()  # all at once loses digits
        with torch.autocast(latent.device.type, enabled=False):
            distance = 2 - 2 * latent.detach() @ latent.detach().T  # (B, B) d² on the unit sphere
        negative, found = semihard_negatives(distance, anchor, positive, negatives, h.margin)
        triplets = latent[anchor], latent[positive], latent[negative]
        # Pairs without a negative have weight zero; to leave them out, one would have to wait for a GPU.
        losses = F.triplet_margin_loss(*triplets, margin=h.margin, reduction="none") * found
        return loss + h.triplet_weight * losses.sum() / found.sum().clamp(min=1)

    def encode(self, cells: Cells | DenseCells) -> Tensor:
        """Points on the unit sphere, (n_cells, n_latent) float32."""
        return F.normalize(self.encoder(cells).float())


def semihard_negatives(
    distance: Tensor, anchor: Tensor, positive: Tensor, negatives: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """For each pair one random negative n with d²(anchor, positive) < d²(anchor, n) < d²(anchor, positive) + margin.

    Distances from a cell are sorted once, and the negatives that suit one of its pairs are then a range of them: so
    memory grows with the square of the cells, not with pairs times negatives. `distance` has d²; `negatives` are bool,
    whether the column is a negative of the row; both are (n_cells, n_cells). Anchors and positives are (n_pairs,)
    int64. Gives negatives, (n_pairs,) int64, and whether there is such a one, (n_pairs,) bool.
    """
    ranked, order = distance.masked_fill(~negatives, torch.inf).sort(dim=1)
    first = torch.searchsorted(ranked, distance, right=True)
    n_suitable = (torch.searchsorted(ranked, distance + margin) - first)[anchor, positive]
    chosen = first[anchor, positive] + (torch.rand(len(anchor), device=distance.device) * n_suitable).long()
    return order[anchor, chosen.clamp(max=len(order) - 1)], n_suitable > 0


def kinship(labels: np.ndarray, ontology: str | Path) -> np.ndarray:
    """Whether of two cell types, names of terms in an OBO file, one is the other or its ancestor, (n, n) bool.

    Ancestors are reached by any relation (is_a, part_of, develops_from and the rest), as in the original. A name
    without a term, or with an obsolete one alone, is refused. The file is from the working directory or the repository.
    """
    terms = read_ontology(paths.located(ontology))
    if unknown := [str(label) for label in labels if label not in terms.identifiers]:
        absent = f"{ontology} has no term named {', '.join(map(repr, unknown))}"
        raise ValueError(f"SCimilarity: {absent}; rename these cell types to its terms, or leave `ontology` out.")
    own = [terms.identifiers[label] for label in labels]
    lineages = [{term, *terms.ancestors(label)} for term, label in zip(own, labels, strict=True)]
    descends = np.array([[term in lineage for term in own] for lineage in lineages], dtype=bool)
    return descends | descends.T


def sampling_weights(labels: np.ndarray, studies: np.ndarray) -> np.ndarray:
    """Weight with which each cell is drawn, (n_cells,) float64: more for rare types and small studies, codes from 0.

    It is 1 / (log(1 + n_type / 10⁴) log(1 + n_study / 10⁶)), n being the numbers of cells, and twice its 99.9th
    percentile at most.
    """
    n_type, n_study = (np.bincount(codes)[codes] for codes in (labels, studies))
    weights = 1 / (np.log1p(n_type / 1e4) * np.log1p(n_study / 1e6))
    return np.minimum(weights, 2 * np.percentile(weights, 99.9))


def weighted_batches(weights: np.ndarray, batch_size: int, steps: int, *, seed: int) -> Iterator[np.ndarray]:
    """Rows of each step's batch, drawn with replacement; those of a step follow from the seed and its number."""
    cumulative = np.cumsum(weights)
    for step in range(steps):
        drawn = np.random.default_rng([seed, step]).random(batch_size) * cumulative[-1]
        yield np.searchsorted(cumulative, drawn, side="right")


class SCimilarity(SparseNetwork):
    """Reconstruct expression, and bring cells of one type in different studies together.

    Supervised: it learns from `obs["cell_type"]`, which no other family reads; compare it with them in that light.
    Defaults are the sizes and settings of DenAdel et al. 2026, but for the weights kept (`base.hold_out`). Expression
    is log-normalised. The loss is `triplet_weight` times a triplet loss on the unit sphere, plus the rest of one times
    the mean squared error over all genes, plus `l1` times the learning rate times the sum of one layer's absolute
    weights: the encoder's first, as was meant, or with `l1_layer="last"` its last, as it came out in theirs.

    Every two cells of a batch that share their type and come from different studies are an anchor and a positive.
    Their negative is a cell whose type is another, and with `ontology` neither ancestor nor descendant of theirs; see
    `semihard_negatives`. Studies are told apart by `obs["dataset_id"]`, or by `obs["batch"]` where all cells are of
    one data set; where they are of one batch too, pairs lie within it. Types of one study alone are kept, as negatives.
    Cells are drawn by `sampling_weights`, with replacement; the learning rate falls as a cosine over the budget. Under
    `torchrun`, pairs and batch statistics are of a process's own share of the batch.
    """

    family = "SCimilarity"

    def network(self, n_genes: int) -> TripletAutoencoder:
        return TripletAutoencoder(n_genes, self.hyperparameters)

    def objective(self, obs: pd.DataFrame, recipe: training.Recipe, n_cells: int) -> training.LossOf:
        relations = self._relations(obs)
        return lambda forward, cells, step: forward(on_device(cells[1]), *relations(cells[0]), recipe.rate(step))

    def course(self, steps: int, n_cells: int) -> dict[str, Any]:
        return {"decay": "cosine", "decay_vectors": True}

    def batches(self, rows: np.ndarray, obs: pd.DataFrame, steps: int, seed: int) -> Iterator[np.ndarray]:
        labels, studies, _ = _codes(obs)
        weights = sampling_weights(labels[rows], studies[rows])
        return (rows[drawn] for drawn in weighted_batches(weights, self.hyperparameters.batch_size, steps, seed=seed))

    @torch.no_grad()
    def heldout_loss(self, counts: sp.csr_matrix, obs: pd.DataFrame) -> float:
        """The loss that is trained, without the penalty of weights: triplets are those among these cells."""
        relations = self._relations(obs)(np.arange(len(obs)))
        return self.ready(counts)(on_device(self.prepare(counts)), *relations, 0.0).item()

    def chance_loss(self, counts: sp.csr_matrix) -> float:
        """That of the mean cell, for which no triplet counts."""
        return (1 - self.hyperparameters.triplet_weight) * base.variance(self.prepare(counts))

    def _relations(self, obs: pd.DataFrame) -> Callable[[np.ndarray], tuple[Tensor, ...]]:
        """By rows, on the device: anchors and positives, and which are negatives, as `semihard_negatives` has them."""
        labels, studies, types = _codes(obs)
        ontology = self.hyperparameters.ontology
        kin = np.eye(len(types), dtype=bool) if ontology is None else kinship(types, ontology)  # no negatives

        def relations(rows: np.ndarray) -> tuple[Tensor, ...]:
            label, study = labels[rows], studies[rows]
            apart = study[:, None] != study if studies.any() else True  # of one study alone, pairs lie within it
            pairs = np.triu((label[:, None] == label) & apart, 1).nonzero()  # each once: the row is the anchor
            return tuple(training.send(torch.from_numpy(table)) for table in (*pairs, ~kin[label[:, None], label]))

        return relations


def _codes(obs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cell type and study of each cell, (n_cells,) int from 0, and the names of the types."""
    if not len(obs):
        raise ValueError("SCimilarity: there are no cells to train on.")
    if LABEL not in obs or obs[LABEL].isna().any():
        missing = f"{obs[LABEL].isna().sum()} cells have no value in" if LABEL in obs else "there is no column"
        remedy = "label every cell of the corpus, or leave SCimilarity out"
        raise ValueError(f"SCimilarity learns from cell types, and {missing} obs[{LABEL!r}]: {remedy}.")
    labels, types = pd.factorize(obs[LABEL].astype(str))
    several = (obs[name] for name in STUDIES if name in obs and (obs[name] != obs[name].iloc[0]).any())
    study = next(several, pd.Series(0, index=obs.index))
    return labels, pd.factorize(study, use_na_sentinel=False)[0], types
