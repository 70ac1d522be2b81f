"""Integration metrics of 10,000 real cells against scib 1.1.7: the same embedding, labels and batches.

scib asks for other versions of what it builds on than this project has, so it is put beside them, not among them:

    pip install --no-deps --target peer scib==1.1.7 leidenalg pydot deprecated wrapt
    g++ -O3 -std=c++11 peer/scib/knn_graph/knn_graph.cpp -o peer/scib/knn_graph/knn_graph.o
    PYTHONPATH=lib:peer python tests/benchmarks/integration.py

The second line is for machines older than glibc 2.38, which the program shipped for LISI needs. kBET needs R, so that
the peer is timed without it; ours is timed with it, and with the intervals of all metrics.

Where values differ by more than 0.01, this is why:

- nmi, ari: scib clusters once, with leidenalg; ours as scib-metrics with igraph, the mean of five times.
  At the peer's clusters they are equal, which is what is asserted.
- isolated_labels: scib has no value if all labels are in all batches; ours is then that of all labels.
- graph_connectivity: scib takes the symmetric graph of UMAP, ours as scib-metrics the directed one of neighbours, in
  which fewer cells hang together.
- clisi, ilisi: scib takes shortest paths over the graph of 15 neighbours for distances, so as to judge graphs too; ours
  as scib-metrics takes distances in the embedding.
"""

import contextlib
import importlib
import io
import sys
import warnings

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from alternate import report

from datawall.cells import datasets, expression
from datawall.tasks import baselines, integration, neighbourhood

N_CELLS = 10_000
EXPLAINED = {"nmi", "ari", "nmi_fixed", "ari_fixed", "isolated_labels", "graph_connectivity", "clisi", "ilisi"}

sys.path.pop(0)  # so that no file here is found in place of a package
pd.value_counts = lambda values: pd.Series(values).value_counts()  # gone from pandas 3; scib calls it
scib, clustering = (importlib.import_module(f"scib.metrics{name}") for name in ("", ".clustering"))
warnings.simplefilter("ignore")

cells = datasets.load("kang2018")
cells = cells[np.sort(np.random.default_rng(0).permutation(cells.n_obs)[:N_CELLS])].copy()
labels, batches = (cells.obs[column].astype("category") for column in ("cell_type", "condition"))
# What is judged is an embedding that lost some of the batches' difference; what it is compared with has all of it.
before = baselines.pca_embedding(cells.X)
after = before.copy()
for batch in batches.cat.categories:
    after[batches == batch, :5] -= after[batches == batch, :5].mean(axis=0)


def judged_by_scib():
    adata = ad.AnnData(expression.lognormalise(cells.X), obs=pd.DataFrame({"label": labels, "batch": batches}))
    adata.obsm["X_emb"] = after
    unintegrated = ad.AnnData(adata.X, obs=adata.obs)
    unintegrated.obsm["X_pca"], unintegrated.uns["pca"] = before, {"variance": before.var(axis=0, ddof=1)}
    with contextlib.redirect_stdout(io.StringIO()):
        sc.pp.neighbors(adata, use_rep="X_emb")
        clustering.cluster_optimal_resolution(adata, "label", "cluster", use_rep="X_emb", verbose=False)
        values = {
            "nmi": scib.nmi(adata, "cluster", "label"),
            "ari": scib.ari(adata, "cluster", "label"),
            "asw_label": scib.silhouette(adata, "label", "X_emb"),
            "isolated_labels": scib.isolated_labels_asw(adata, "label", "batch", "X_emb", verbose=False),
            "clisi": scib.clisi_graph(adata, "label", type_="embed", use_rep="X_emb"),
            "asw_batch": scib.silhouette_batch(adata, "batch", "label", "X_emb", verbose=False),
            "graph_connectivity": scib.graph_connectivity(adata, "label"),
            "ilisi": scib.ilisi_graph(adata, "batch", type_="embed", use_rep="X_emb"),
            "pcr_comparison": scib.pcr_comparison(unintegrated, adata, "batch", embed="X_emb"),
        }
    clusters = adata.obs["cluster"].cat.codes.to_numpy().astype(np.int64)
    tables = neighbourhood.contingency(clusters, labels.cat.codes.to_numpy().astype(np.int64), np.ones((1, N_CELLS)))
    assert abs(neighbourhood.nmi(tables)[0] - values["nmi"]) < 1e-9
    assert abs(neighbourhood.ari(tables)[0] - values["ari"]) < 1e-9
    return values


def judged_here():
    return integration.zeroshot_integration(after, labels.to_numpy(), batches.to_numpy(), unintegrated=before)


peer, ours = judged_by_scib(), judged_here()
for name, value in ours.items():
    apart = abs(value - peer.get(name, np.nan))
    print(f"{name:20} ours {value:.4f}  scib {peer.get(name, np.nan):.4f}  apart {apart:.4f}")
    assert name in EXPLAINED or not apart > 0.01, name
report("cells", N_CELLS, judged_by_scib, judged_here)
