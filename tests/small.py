"""A small study of cells that come with scanpy; tests change what they are about."""

from datawall.cells import simulate
from datawall.study import params
from datawall.study.study import Study

STUDY = {
    "study": "small", "corpus": "pbmc68k", "strategies": ["random"], "percentages": [100], "seeds": [0],
    "models": ["PretrainedPCA"], "steps": 1, "tasks": ["zeroshot_classification"], "workers": 1,
}  # fmt: skip


def small_study(folder, **changes):
    return Study(params.check(STUDY | changes, "small.yaml"), folder)


def atlas(n_cells, n_genes=300, **more):
    """Simulated cells of three types."""
    composition = {"classical monocyte": 5, "naive B cell": 3, "natural killer cell": 2}
    return simulate.Atlas(n_cells=n_cells, n_genes=n_genes, composition=composition, **more)
