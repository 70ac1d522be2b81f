"""Rank-value encoding against the procedure of Geneformer's own tokenizer (chunks of 512, argsort per cell).

Floor: a cell's detected genes must be read once and its keys sorted, about n log n comparisons.
"""

import numpy as np
import scipy.sparse as sp
from alternate import report

from datawall.tokenizer import RankTokenizer

N_CELLS, N_GENES, DETECTED = 10_000, 19_331, 1_660


def simulated(rng):
    lengths = rng.poisson(DETECTED, N_CELLS)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    indices = np.concatenate([np.sort(rng.choice(N_GENES, n, replace=False)) for n in lengths])
    counts = rng.geometric(0.5, indptr[-1]).astype(np.float32)
    return sp.csr_matrix((counts, indices, indptr), shape=(N_CELLS, N_GENES))


def peer_encode(counts, medians, max_length=2048):
    sentences = []
    for first in range(0, counts.shape[0], 512):
        chunk = counts[first : first + 512]
        totals = np.asarray(chunk.sum(axis=1)).ravel()
        scaled = sp.csr_matrix(sp.diags(1e4 / totals) @ chunk @ sp.diags(1 / medians))
        for i in range(scaled.shape[0]):
            row = scaled[i]
            sentences.append(row.indices[np.argsort(-row.data)][:max_length] + 2)
    return sentences


rng = np.random.default_rng(0)
counts = simulated(rng)
medians = rng.gamma(2.0, 1.5, N_GENES).astype(np.float32) + 0.1
tokenizer = RankTokenizer(medians)
tokens, sentences = tokenizer.encode(counts), peer_encode(counts, medians)
assert all(
    set(tokens.ids[a:b]) == set(sentence)
    for a, b, sentence in zip(tokens.offsets[:-1], tokens.offsets[1:], sentences, strict=True)
    if len(sentence) < 2048
)
report("cells", N_CELLS, lambda: peer_encode(counts, medians), lambda: tokenizer.encode(counts))
