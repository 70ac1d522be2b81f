"""What a GPU makes of the library's networks: equality with the CPU, tokens a second, share of the peak, memory.

    python tests/benchmarks/gpu.py            # on a GPU, at the original's sizes; at most six minutes
    python tests/benchmarks/gpu.py --small    # a rehearsal on a CPU, which says nothing of speed

It needs torch, numpy and what `datawall.models.transformer` and `datawall.engine.processes` import; no data.

The peer is the same network with the same weights, run as `BertForMaskedLM` runs it: every cell padded to 2,048, a
mask handed to SDPA, the head at every position, all logits at once (`tests/test_transformer.py` holds ours against
transformers' own, number for number). `masked_autoencoder.py` has the sparse layers, on a GPU too. A share of the
peak counts a multiplication and an addition as two operations, and no work that is done twice.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from alternate import in_turn, seconds_of, training_step, wait

from datawall.engine import processes
from datawall.models import transformer
from datawall.models.transformer import N_SPECIAL, Encoder, EncoderConfig, Layout, mask_tokens, send

ORIGINAL_SECONDS = 116  # to embed 10,000 tokenised cells


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
    torch.manual_seed(0)
    encoder = Encoder(config).to(where)
    ids, offsets = batch(n_cells, config)
    masked, chosen, originals = mask_tokens(ids, config.vocab_size)

    def ours():
        hidden = send(chosen, where), send(originals, where)
        with half():
            return encoder(send(masked, where), Layout(offsets, where), *hidden)

    def peer():
        with half():
            return padded_loss(encoder, masked, offsets, chosen, originals)

    with torch.no_grad():
        encoder.eval()
        both = ours().item(), peer().item()
        attends = transformer.attention(where, config.n_embd // config.n_heads).__name__
    assert abs(both[0] - both[1]) < 0.02, both
    peer_step, our_step = (training_step(encoder.train(), each, lr=1e-4, fused=True) for each in (peer, ours))
    theirs, own, ratio = in_turn(peer_step, our_step)
    n_operations = operations(encoder, offsets, len(chosen))
    share = f"{n_operations / own / peak:.0%} of the peak" if peak else "peak not known"
    print(
        f"{name}, {n_cells} cells, {len(ids):,} tokens, {attends}: {len(ids) / own:,.0f} tokens a second, {share}, "
        f"{n_operations / len(ids) / 2e6:.1f} million multiplications a token; padded {len(ids) / theirs:,.0f}; "
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
            encoder.embed(send(ids, where), Layout(offsets, where)).cpu()

    embed()
    scaled = seconds_of(embed) * 10_000 / n_embedded
    print(f"{name}: 10,000 cells embedded in {scaled:.1f} s (the original took {ORIGINAL_SECONDS})", flush=True)


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
else:
    pretraining("6 x 256", EncoderConfig(vocab_size=25_426), 24)
    pretraining("12 x 512", EncoderConfig(25_426, n_layers=12, n_heads=8, n_embd=512, n_inner=1024), 24)
