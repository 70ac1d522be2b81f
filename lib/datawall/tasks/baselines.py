"""What a user would try first: no pretrained model beats nothing until it beats these."""

import warnings

import numpy as np
import scipy.sparse as sp

from datawall.cells import expression

# Fitted to the evaluation cells themselves: variable genes, or so many principal components; 50 are the original's.
EMBEDDINGS: dict[str, int | None] = {"HVG": None, "PCA": 50, "PCA-20": 20, "PCA-10": 10}


def variable_gene_embedding(counts: sp.csr_matrix) -> np.ndarray:
    """Highly variable genes of the evaluation cells themselves, log-normalised and scaled to unit variance.

    The original study's HVG baseline (scanpy's default cut-offs, no clipping), (n_cells, n_variable_genes) float32.
    """
    X = expression.lognormalise(counts)
    X = X[:, expression.variable_genes(X)].toarray()
    deviation = X.std(axis=0)
    return ((X - X.mean(axis=0)) / np.where(deviation > 0, deviation, 1)).astype(np.float32)


def pca_embedding(counts: sp.csr_matrix, n_components: int = 50) -> np.ndarray:
    """Principal components of those genes, (n_cells, n_components) float32: the original's PCA baseline."""
    return expression.pca_scores(variable_gene_embedding(counts), n_components)


def logistic_regression(
    train_counts: sp.csr_matrix, train_labels: np.ndarray, test_counts: sp.csr_matrix, *, max_iter: int = 200
) -> np.ndarray:
    """Labels predicted by an L1 logistic regression on log-normalised variable genes of the training cells.

    Counts are (n_cells, n_genes), labels (n_cells,), and what is predicted (n_test_cells,). Where all training cells
    are of one type, that one is predicted. Raises ValueError if they are of several, and none of the genes is variable.

    Settings are the original study's (C = 1, saga, seed 1), which fitted on normalised and predicted on un-normalised
    counts; here both are normalised. Genes are scaled by their largest training value, so that saga converges.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MaxAbsScaler

    if len(np.unique(train_labels)) == 1:
        return np.repeat(train_labels[:1], test_counts.shape[0])
    X = expression.lognormalise(train_counts)
    variable = expression.variable_genes(X)
    regression = LogisticRegression(l1_ratio=1.0, C=1.0, solver="saga", random_state=1, max_iter=max_iter, tol=1e-3)
    pipeline = make_pipeline(MaxAbsScaler(), regression)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        pipeline.fit(X[:, variable], train_labels)
    return pipeline.predict(expression.lognormalise(test_counts)[:, variable])


def treated_mean(train_treated: np.ndarray, train_context: np.ndarray) -> np.ndarray:
    """A prediction of treated cells: their mean in the other contexts, (1, n_genes), each of which counts alike.

    The original study's average baseline took the held-out context's own treated cells, which is no prediction.
    """
    means = [train_treated[train_context == context].mean(axis=0) for context in np.unique(train_context)]
    return np.mean(means, axis=0)[None]
