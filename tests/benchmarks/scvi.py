"""One training step on one core against scvi-tools' module: same counts, weights, dropout and noise.

1,024 cells x 19,331 genes, of which a cell expresses about 1,660. The peer's batch is dense already, ours is taken from
sparse counts. Floor: the decoder's three matrix products, 6 * cells * genes * n_hidden = 15.2 Gflop, at the speed of
a product of square matrices; nothing of size cells * genes has to leave the cache.
"""

import importlib
import sys
import warnings

import numpy as np
import scipy.sparse as sp
import torch
from alternate import N_GENES, matrix_speed, report, shortest, training_step

from datawall.models.hyperparameters import ScVI
from datawall.models.scvi import Autoencoder

torch.set_num_threads(1)  # as the study's processes have, and so that the number of cores does not matter
sys.path.pop(0)  # this file would be found as scvi-tools
warnings.simplefilter("ignore")
VAE = importlib.import_module("scvi.module").VAE

CELLS, KL_WEIGHT = 1024, 0.5
UNUSED = ("l_encoder", "decoder.px_r_decoder", "decoder.px_dropout_decoder")

rng = np.random.default_rng(0)
rates = rng.lognormal(0, 2.2, N_GENES)
rates = rates / rates.sum() * rng.lognormal(8.3, 0.6, (CELLS, 1)) * rng.gamma(1, 1, (CELLS, N_GENES))
counts = sp.csr_matrix(rng.poisson(rates).astype(np.float32))
print(f"{counts.nnz / CELLS:,.0f} genes a cell")

torch.manual_seed(0)
ours, peer = Autoencoder(N_GENES, ScVI()), VAE(N_GENES, n_batch=1, n_labels=1, gene_likelihood="nb")
theirs = [weight for name, weight in peer.named_parameters() if not name.startswith(UNUSED)]
for own, weight in zip(ours.parameters(), theirs, strict=True):
    own.data.copy_(weight.data.T if own is ours.encoder[0].weight else weight.data)
batch = {"X": torch.from_numpy(counts.toarray()), "batch": torch.zeros(CELLS, 1), "labels": torch.zeros(CELLS, 1)}
adam = {"optimiser": torch.optim.Adam, "lr": 1e-3, "eps": 0.01, "weight_decay": 1e-6}


def our_loss():
    torch.manual_seed(1)
    return ours(counts[np.arange(CELLS)], KL_WEIGHT)


def peer_loss():
    torch.manual_seed(1)
    return peer(batch, loss_kwargs={"kl_weight": KL_WEIGHT})[2].loss


our_step, peer_step = training_step(ours, our_loss, fused=True, **adam), training_step(peer, peer_loss, **adam)
for _ in range(2):  # the second after a step of the optimiser, so that it compares gradients too
    expected, loss = peer_step().item(), our_step().item()
    print(f"loss {loss:.3f}, peer {expected:.3f}, apart by {abs(loss / expected - 1):.0e}")
    assert abs(loss / expected - 1) < 1e-4

floor = 6 * CELLS * N_GENES * ScVI().n_hidden / matrix_speed()
print(f"floor {floor:.3f} s, {floor / shortest(our_step):.0%} of our step")
print(f"the peer's data loader would add {shortest(lambda: counts[np.arange(CELLS)].toarray()):.3f} s")
report("cells", CELLS, peer_step, our_step)
