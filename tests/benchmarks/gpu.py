"""What a GPU makes of the library's networks: equality with the CPU, tokens a second, share of the peak, memory.

    python tests/benchmarks/gpu.py            # on a GPU, at the original's sizes; at most six minutes
    python tests/benchmarks/gpu.py --small    # a rehearsal on a CPU, which says nothing of speed

It needs torch, numpy, scipy, and what the modules of networks import (pandas, safetensors, tqdm); no data.

The peer of the transformer is the same network with the same weights, run as `BertForMaskedLM` runs it: every cell
padded to 2,048, a mask handed to SDPA, the head at every position, all logits at once (`tests/test_transformer.py`
holds ours against transformers' own, number for number). The peer of any other family is its plain dense form, which is
handed its batch on the device, where ours starts from rows of a sparse matrix in the memory of the processor. A share
of the peak counts a multiplication and an addition as two operations, and no work that is done twice.
"""

import argparse
import itertools
from types import SimpleNamespace

import masked_autoencoder
import numpy as np
import scimilarity
import torch
import torch.nn.functional as F
from alternate import N_GENES, cells, copy_weights, in_turn, seconds_of, training_step, wait
from torch import nn

from datawall.engine import processes
from datawall.models import scvi, sparse, transformer
from datawall.models.scimilarity import semihard_negatives
from datawall.models.training import send
from datawall.models.transformer import N_SPECIAL, Encoder, EncoderConfig, Layout, mask_tokens

N_BATCHES = 8  # of different numbers of tokens
ORIGINAL_SECONDS = 116  # to embed 10,000 tokenised cells
# Of the original, as `datawall.models.hyperparameters` has them, which needs pydantic.
SSL = {"n_hidden": [512, 512, 256, 256], "n_latent": 64, "dropout": 0.1, "mask": 0.5, "loss": "masked"}
SSL |= {"output": "linear", "learning_rate": 1e-3, "weight_decay": 0.01, "clip_norm": 1.0}
SCIMILARITY = {"n_hidden": [1024] * 3, "n_latent": 128, "input_dropout": 0.4, "dropout": 0.5, "margin": 0.05}
SCIMILARITY |= {"triplet_weight": 0.001, "l1": 1e-4, "l1_layer": "first", "learning_rate": 0.005, "weight_decay": 0.01}
SCVI = {"n_hidden": 128, "n_latent": 10, "n_layers": 1, "dropout": 0.1}


def peak_memory(run):
    if not on_gpu:
        return "memory: GPU only"
    torch.cuda.reset_peak_memory_stats()
    run()
    wait()
    return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at the peak"


def batch(n_cells, config, seed=0):
    """Random cells on the CPU: ids, offsets."""
    lengths = np.clip(np.random.default_rng(seed).normal(0.81, 0.1, n_cells), 0.1, 1) * config.max_length
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths.astype(np.int64))]))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(N_SPECIAL, config.vocab_size, (int(offsets[-1]),), generator=generator), offsets


def half():
    return torch.autocast(where.type, torch.bfloat16, enabled=on_gpu)


def padded_loss(encoder, ids, offsets, chosen, originals):
    """The loss as `BertForMaskedLM` takes it."""
    config, lengths = encoder.config, offsets.diff().tolist()
    targets = torch.full_like(ids, -100).index_copy(0, chosen, originals)
    rows = [
        torch.stack([F.pad(row, (0, config.max_length - len(row)), value=fill) for row in each.split(lengths)]).to(
            where
        )
        for each, fill in ((ids, 0), (targets, -100), (torch.ones_like(ids), 0))
    ]
    mask = rows[2].bool()[:, None, None]

    def attend(q, k, v, *_):
        q, k, v = (x.view(len(lengths), config.max_length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(0, 1)

    x = encoder.tokens(rows[0]) + encoder.positions.weight
    x = encoder.dropout(encoder.norm(x)).flatten(0, 1)
    layout = Layout(torch.tensor([0, len(x)]))  # not looked at by `attend`
    for layer in encoder.layers:
        x = layer.finish(x, layer.attention(x, layout, attend))
    x = F.linear(encoder.head_norm(F.relu(encoder.head(x))), encoder.tokens.weight, encoder.head_bias)
    return F.cross_entropy(x.float(), rows[1].flatten())


def operations(encoder, offsets, n_masked):
    """Of a step, there and back."""
    config, lengths = encoder.config, offsets.diff().double()
    in_layers = sum(weight.numel() for weight in encoder.layers.parameters() if weight.ndim > 1)
    in_head = encoder.tokens.weight.numel() + encoder.head.weight.numel()
    pairs = float((lengths**2).sum()) * config.n_embd * config.n_layers
    return 6 * in_layers * float(lengths.sum()) + 6 * in_head * n_masked + 12 * pairs


def parity():
    config = EncoderConfig(vocab_size=500, max_length=128, n_layers=3, n_embd=64, n_inner=128, dropout=0.0)
    torch.manual_seed(0)
    encoder = Encoder(config)
    ids, offsets = batch(6, config)
    batch_of_step = mask_tokens(ids, config.vocab_size)
    found = {}
    for name, there, autocast in (("CPU", "cpu", False), ("float32", where, False), ("bf16", where, True)):
        encoder.to(there).zero_grad()
        with torch.autocast(torch.device(there).type, torch.bfloat16, enabled=autocast):
            masked, *hidden = (send(part, there) for part in batch_of_step)
            loss = encoder(masked, Layout(offsets, there), *hidden)
        loss.backward()
        found[name] = loss.item(), torch.cat([weight.grad.flatten() for weight in encoder.parameters()]).cpu()
    for name in ("float32", "bf16"):
        loss, gradient = (abs(found[name][0] - found["CPU"][0]), (found[name][1] - found["CPU"][1]).norm())
        print(f"parity in {name}: loss differs by {loss:.1e}, gradients by {gradient / found['CPU'][1].norm():.1e}")


def pretraining(name, config, n_cells):
    """Steps on batches of different lengths in turn, as some kernels are slow at each new one."""
    torch.manual_seed(0)
    encoder = Encoder(config).to(where)
    batches = [batch(n_cells, config, seed) for seed in range(N_BATCHES)]
    masked = [mask_tokens(ids, config.vocab_size) for ids, _ in batches]
    ours_next, peers_next, embedded_next = (itertools.cycle(range(N_BATCHES)) for _ in range(3))

    def ours():
        i = next(ours_next)
        ids, *hidden = (send(part, where) for part in masked[i])
        return encoder(ids, Layout(batches[i][1], where), *hidden)

    def peer():
        i = next(peers_next)
        ids, *hidden = masked[i]
        return padded_loss(encoder, ids, batches[i][1], *hidden)

    with torch.no_grad(), half():
        encoder.eval()
        both = ours().item(), peer().item()
        attends = transformer.attention(where, config.n_embd // config.n_heads).__name__
    assert abs(both[0] - both[1]) < 0.02, both
    peer_step, our_step = (training_step(encoder.train(), each, lr=1e-4, fused=True) for each in (peer, ours))
    theirs, own, ratio = in_turn(peer_step, our_step)
    n_tokens = np.mean([len(ids) for ids, _ in batches])
    of_each = zip(batches, masked, strict=True)
    n_operations = np.mean([operations(encoder, offsets, len(chosen)) for (_, offsets), (_, chosen, _) in of_each])
    share = f"{n_operations / own / peak:.0%} of the peak" if peak else "peak not known"
    print(
        f"{name}, {n_cells} cells, {n_tokens:,.0f} tokens, {attends}: {n_tokens / own:,.0f} tokens a second, {share}, "
        f"{n_operations / n_tokens / 2e6:.1f} million multiplications a token; padded {n_tokens / theirs:,.0f}; "
        f"ratio {ratio:.1f}; {peak_memory(our_step)}, padded {peak_memory(peer_step)}",
        flush=True,
    )
    if arguments.profile:
        with torch.profiler.profile() as profile:
            our_step(), wait()
        print(profile.key_averages().table(sort_by=f"self_{where.type}_time_total", row_limit=15))
    encoder.eval()
    n_embedded = 20 * n_cells if arguments.small else 10_000

    def embed():
        for _ in range(0, n_embedded, n_cells):
            ids, offsets = batches[next(embedded_next)]
            encoder.embed(send(ids, where), Layout(offsets, where)).cpu()

    embed()
    scaled = seconds_of(embed) * 10_000 / n_embedded
    print(f"{name}: 10,000 cells embedded in {scaled:.1f} s (the original took {ORIGINAL_SECONDS})", flush=True)


class DenseVAE(nn.Module):
    """scVI with every count written out, as scvi-tools has it."""

    def __init__(self, n_genes, h):
        super().__init__()

        def hidden(n_inputs, dropout):
            norm = nn.BatchNorm1d(h.n_hidden, eps=1e-3, momentum=0.01)
            return nn.Sequential(nn.Linear(n_inputs, h.n_hidden), norm, nn.ReLU(), nn.Dropout(dropout))

        self.encoder = hidden(n_genes, h.dropout)
        self.mean, self.log_variance = (nn.Linear(h.n_hidden, h.n_latent) for _ in range(2))
        self.decoder, self.share = hidden(h.n_latent, 0), nn.Linear(h.n_hidden, n_genes)
        self.log_theta = nn.Parameter(torch.randn(n_genes))

    @torch.autocast("cuda", enabled=False)  # as ours
    def forward(self, x, kl_weight):
        encoded = self.encoder(x.log1p())
        mean, variance = self.mean(encoded), self.log_variance(encoded).exp() + 1e-4
        z = mean + variance.sqrt() * torch.randn_like(mean)
        mu = x.sum(1, keepdim=True) * self.share(self.decoder(z)).softmax(1)
        theta, eps = self.log_theta.exp(), 1e-8
        log_sum = (theta + mu + eps).log()
        likelihood = theta * ((theta + eps).log() - log_sum) + x * ((mu + eps).log() - log_sum)
        likelihood = likelihood + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        divergence = (mean.square() + variance - 1 - variance.log()).sum(1) / 2
        return (kl_weight * divergence - likelihood.sum(1)).mean()


def contest_of_scvi(X):
    h = SimpleNamespace(**SCVI)
    x, rows = torch.from_numpy(X.toarray()).to(where), np.arange(X.shape[0])
    module, peer = scvi.Autoencoder(X.shape[1], h).to(where), DenseVAE(X.shape[1], h).to(where)
    copy_weights(module, peer)
    adam = {"optimiser": torch.optim.Adam, "lr": 1e-3, "eps": 0.01, "weight_decay": 1e-6, "fused": True}
    losses = peer(x, 0.5).item(), module(X[rows], 0.5).item()
    assert abs(losses[0] / losses[1] - 1) < 0.01, losses  # dropout and noise are drawn anew
    steps = {peer: lambda: peer(x, 0.5), module: lambda: module(X[rows], 0.5)}
    return [training_step(each, loss, **adam) for each, loss in steps.items()]


def autoencoders(n_cells, n_genes):
    """A step of each family beside its plain dense form."""
    rng = np.random.default_rng(0)
    detected = n_genes * 1660 // N_GENES
    X = cells(n_cells, rng, lambda n: rng.gamma(4, 0.3, n), n_genes=n_genes, detected=detected)
    types, studies = rng.integers(0, 10, n_cells), rng.integers(0, 5, n_cells)
    *pairs, negatives = (torch.from_numpy(each).to(where) for each in scimilarity.pairs_and_negatives(types, studies))

    def mine(latent):
        negative, found = semihard_negatives(2 - 2 * latent @ latent.T, *pairs, negatives, SCIMILARITY["margin"])
        return [each[found] for each in (*pairs, negative)]

    for name, steps in {
        "SSL": masked_autoencoder.contest(SimpleNamespace(**SSL), X, where),
        "SCimilarity": scimilarity.contest(SimpleNamespace(**SCIMILARITY), X, types, studies, mine, where)[:2],
        "scVI": contest_of_scvi(X.ceil()),
    }.items():
        theirs, ours, ratio = in_turn(*steps)
        per = f"{n_cells / ours:,.0f} cells a second, dense {n_cells / theirs:,.0f}; ratio {ratio:.1f}"
        print(f"{name}, {n_cells:,} cells x {n_genes:,} genes: {per}; {peak_memory(steps[1])}", flush=True)
    seconds = seconds_of(lambda: sparse.on_device(X[np.arange(n_cells)]))
    print(f"of our step, until the cells are on the device: {1e3 * seconds:.1f} ms", flush=True)


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--small", action="store_true", help="sizes for a CPU")
parser.add_argument("--profile", action="store_true", help="the kernels of one step")
arguments = parser.parse_args()
on_gpu = torch.cuda.is_available()
where = torch.device("cuda" if on_gpu else "cpu")
name_of_device = torch.cuda.get_device_name() if on_gpu else "CPU, where nothing here says what a GPU does"
peak = processes.peak(name_of_device)
print(f"{name_of_device}, torch {torch.__version__}, layers compiled: {on_gpu and transformer.COMPILED}", flush=True)
parity()
if arguments.small:
    pretraining("2 x 64", EncoderConfig(vocab_size=1_000, max_length=128, n_layers=2, n_embd=64, n_inner=128), 8)
    autoencoders(64, 2_000)
else:
    pretraining("6 x 256", EncoderConfig(vocab_size=25_426), 24)
    pretraining("12 x 512", EncoderConfig(25_426, n_layers=12, n_heads=8, n_embd=512, n_inner=1024), 24)
    autoencoders(1_000, N_GENES)
