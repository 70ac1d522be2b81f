"""A small study of cells that come with scanpy; tests change what they are about."""

from datawall.cells import simulate
from datawall.study import params
from datawall.study.study import Study

STUDY = {
    "study": "small", "corpus": "pbmc68k", "strategies": ["random"], "percentages": [100], "seeds": [0],
    "models": ["PretrainedPCA"], "steps": 1, "tasks": ["zeroshot_classification"], "workers": 1,
}  # fmt: skip
# Families as small as they train, on real cells.
FAMILIES = {
    "PretrainedPCA": {},
    "scVI": {"batch_size": 32, "n_hidden": 16, "n_genes": 50},
    "SSL": {"batch_size": 32, "n_hidden": [32, 16]},
    "ssl_vae": {"batch_size": 32, "n_hidden": [32, 16]},
    "Geneformer": {"batch_size": 8, "n_layers": 2, "n_embd": 16, "max_length": 32, "n_genes": 50},
    "SCimilarity": {"batch_size": 32, "n_hidden": [32, 16]},
}


def small_study(folder, **changes):
    return Study(params.check(STUDY | changes, "small.yaml"), folder)


def atlas(n_cells, n_genes=300, **more):
    """Simulated cells of three types."""
    composition = {"classical monocyte": 5, "naive B cell": 3, "natural killer cell": 2}
    return simulate.Atlas(n_cells=n_cells, n_genes=n_genes, composition=composition, **more)
