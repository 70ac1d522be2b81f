"""Label cells from clusters and canonical marker genes, for a corpus that comes without labels."""

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from datawall.cells import expression
from datawall.engine import paths

MARKERS = pd.read_csv(paths.PACKAGE_DATA / "pbmc_markers.csv", index_col="cell_type")["symbols"]
PBMC_MARKERS = MARKERS.str.split().to_dict()  # symbols by cell type, from these sources
PBMC_MARKER_SOURCES = {
    "Butler et al. 2018, markers of these same cells": "10.1038/nbt.4096",
    "Kang et al. 2018": "10.1038/nbt.4042",
    "Villani et al. 2017, monocytes and dendritic cells": "10.1126/science.aah4573",
    "Zheng et al. 2017, 10x PBMC": "10.1038/ncomms14049",
}
COMPONENTS, NEIGHBOURS, RESOLUTION = 20, 30, 0.8  # of the graph that cells are clustered in
# Types so alike that clusters mix them: within each group a cell's own neighbourhood decides.
PBMC_SIBLINGS = (
    ("CD4 T cells", "CD8 T cells"),
    ("CD14+ Monocytes", "FCGR3A+ Monocytes"),
    ("Dendritic cells", "Plasmacytoid dendritic cells"),
)


def annotate(
    counts: sp.csr_matrix, genes: pd.Index, batches: pd.Series, markers: dict[str, list[str]]
) -> pd.Categorical:
    """Cell types (n_cells,) from coarse Leiden clusters, each named by its markers; siblings told apart cell by cell.

    1. Genes that vary within `batches` (conditions, or samples) are log-normalised, centred and scaled within each, and
    reduced to principal components. 2. Coarse Leiden clusters of the exact neighbour graph get the type whose markers
    (symbols among `genes`, the columns), as mean z-scores within batches, are highest. 3. Between siblings (say CD4 and
    CD8 T cells), which share a cluster, a cell gets the type whose marker score is higher on average over itself and
    its neighbours. On an exact, unweighted graph, labels come out the same on another machine with the same package
    versions (on an approximate one they do not; scanpy#2956). Raises ValueError if a type has no known marker.
    """
    import scanpy as sc
    from sklearn.neighbors import kneighbors_graph

    known = {name: [gene for gene in given if gene in genes] for name, given in markers.items()}
    if absent := [name for name, given in known.items() if not given]:
        raise ValueError(f"no marker of {absent} is among the genes; give symbols that the data set has.")
    batch = pd.Categorical(batches).codes
    adata = ad.AnnData(expression.lognormalise(counts), var=pd.DataFrame(index=genes))
    adata.obs["batch"] = pd.Categorical(batch)
    sc.pp.highly_variable_genes(adata, n_top_genes=min(2000, adata.n_vars), batch_key="batch")
    X = _scaled_within(adata[:, adata.var["highly_variable"]].X.toarray().astype(np.float64), batch)
    axes, _ = expression.principal_axes(np.clip(X, -10, 10), COMPONENTS)
    neighbours = kneighbors_graph(np.clip(X, -10, 10) @ axes.T, NEIGHBOURS)
    neighbours = neighbours.maximum(neighbours.T).tocsr()

    every_marker = sorted({gene for given in known.values() for gene in given})
    z = pd.DataFrame(_scaled_within(adata[:, every_marker].X.toarray().astype(np.float64), batch), columns=every_marker)
    scores = pd.DataFrame({name: z[given].mean(axis=1) for name, given in known.items()})

    sc.tl.leiden(adata, RESOLUTION, adjacency=neighbours, use_weights=False, flavor="igraph", directed=False)
    cluster = adata.obs["leiden"].to_numpy()
    labels = scores.groupby(cluster).mean().idxmax(axis=1).reindex(cluster).to_numpy(dtype=object)

    smooth = scores + neighbours @ scores.to_numpy()  # sums, which order a cell's types as means do
    for group in PBMC_SIBLINGS:
        among = np.isin(labels, group)
        labels[among] = smooth.loc[among, list(group)].idxmax(axis=1)
    return pd.Categorical(labels, categories=list(markers)).remove_unused_categories()


def _scaled_within(X: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and standard deviation 1 within each batch; constant ones stay 0."""
    scaled = np.empty_like(X)
    for code in np.unique(batch):
        rows = batch == code
        centred = X[rows] - X[rows].mean(axis=0)
        deviation = centred.std(axis=0)
        scaled[rows] = centred / np.where(deviation > 0, deviation, 1)
    return scaled
