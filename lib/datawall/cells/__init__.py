"""Which cells and genes there are: sources, the corpus on disk, its labels, subsets and their diversity.

Serves notebook 1. May import `engine`.

`counts` are raw, a scipy CSR matrix (n_cells, n_genes), and left as they are; labels, donors and groups are (n_cells,);
rows are sorted int64 positions without repeats. What is wrong with the user's data is told by `corpus.CorpusError`.
"""
