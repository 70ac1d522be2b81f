"""Counts found, genes joined, mistakes refused by name, cells divided in proportion."""

import re

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from datawall.cells import corpus, sampling

TABLE = corpus.gene_table()


def toy(n_cells=12, n_genes=20, *, ids=False):
    """Poisson counts of genes spread over the gene table, in shuffled order; no cell is empty."""
    rng = np.random.default_rng(0)
    chosen = TABLE.iloc[rng.permutation(len(TABLE))[:n_genes]]
    counts = rng.poisson(2.0, (n_cells, n_genes)).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame({"cell_type": ["a", "b"] * (n_cells // 2)}, index=[f"cell{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=list(chosen.index if ids else chosen["feature_name"]))
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)


def renamed(adata, names):
    """The same cells with other gene names, which may repeat."""
    new = ad.AnnData(adata.X.copy(), obs=adata.obs.copy())
    new.var.index = pd.Index(list(names))
    return new


# Counts


def with_values(*values, dtype=np.float32):
    adata = toy()
    dense = adata.X.toarray().astype(dtype)
    dense[0, : len(values)] = values
    new = ad.AnnData(obs=adata.obs, var=adata.var)
    new.X = dense
    return new


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("value", "fault"),
    [(0.25, "fractions (such as 0.25)"), (-3, "negative values (as low as -3)"), (np.nan, "NaN"), (np.inf, "infinite")],
)
def test_what_is_no_count_is_refused(value, fault, sparse):
    adata = with_values(value)
    if sparse:
        adata.X = sp.csc_matrix(adata.X)
    with pytest.raises(corpus.CorpusError, match=f"mine: X .*{re.escape(fault)}.*non-negative integers"):
        corpus.align(adata, "mine")


def test_counts_that_single_precision_cannot_hold_are_refused():
    assert corpus.align(with_values(2**24, dtype=np.int64), "mine")[0].X.max() == 2**24
    with pytest.raises(corpus.CorpusError, match=r"counts above 16,777,216 \(up to 16777218\)"):
        corpus.align(with_values(2**24 + 2, dtype=np.int64), "mine")


def test_messages_are_one_line_of_bounded_length():
    message = str(corpus.CorpusError(f"file: a name\nwith {'x' * 5000} breaks; remedy."))
    assert re.fullmatch(r"file: a name with x.{100,950}breaks; remedy\.", message)


# Genes


@pytest.mark.parametrize("ids", [False, True])
def test_align_keeps_every_count_with_its_gene(ids):
    adata = toy(ids=ids)
    names = [*adata.var_names[:-3], "AC000001.1", "ENSG99999999999", "gene-x"]
    adata.var_names = names
    aligned, match = corpus.align(adata, "mine")
    dense = pd.DataFrame(adata.X.toarray(), index=adata.obs_names, columns=names)
    if not ids:
        dense.columns = [dict(zip(TABLE["feature_name"], TABLE.index, strict=True)).get(name, name) for name in names]
    expected = dense[[gene for gene in TABLE.index if gene in dense.columns]]
    pd.testing.assert_frame_equal(aligned.to_df(), expected, check_names=False)
    assert (aligned.var["feature_name"] == TABLE.loc[aligned.var_names, "feature_name"]).all()
    told = {"dataset": "mine", "counts_from": "X", "named_by": "Ensembl id" if ids else "symbol", "n_genes": 20}
    told |= {"matched": 17, "missing": 3, "duplicated": 0, "other_features": 0}
    counts_found = round(float(dense.iloc[:, :17].to_numpy().sum() / dense.to_numpy().sum()), 4)
    assert match.row() == {**told, "counts_found": counts_found}
    assert adata.var_names.tolist() == names


def test_feature_name_outranks_var_names():
    adata = toy()
    named = adata.copy()
    named.var["feature_name"] = adata.var_names.to_numpy()
    named.var_names = [f"row{i}" for i in range(adata.n_vars)]
    a, b = corpus.align(adata, "mine")[0], corpus.align(named, "mine")[0]
    pd.testing.assert_frame_equal(a.to_df(), b.to_df())


def test_every_gene_of_the_table_is_found_by_its_id_and_by_its_symbol():
    symbols = TABLE["feature_name"]
    for names in (TABLE.index, symbols, symbols.str.replace("-", ".")):  # as R spells symbols
        position, match = corpus.find_genes(pd.DataFrame(index=pd.Index(names)), "mine", "X", np.ones(len(TABLE)))
        assert np.array_equal(position, np.arange(len(TABLE)))
        assert match.matched == len(TABLE)


def test_columns_of_one_gene_are_summed():
    symbols, ids = toy().var_names, toy(ids=True).var_names
    # The first gene four times: by symbol, by id, and by two versions of the id. A name unknown twice is no gene.
    names = [symbols[0], ids[0], f"{ids[0]}.1", f"{ids[0]}.12", "novel", "novel", *symbols[6:]]
    adata = toy()
    dense = adata.X.toarray()
    adata = renamed(adata, names)
    aligned, match = corpus.align(adata, "mine")
    assert np.array_equal(aligned[:, ids[0]].X.toarray().ravel(), dense[:, :4].sum(axis=1))
    for i in range(6, 20):
        assert np.array_equal(aligned[:, ids[i]].X.toarray().ravel(), dense[:, i])
    assert aligned.n_vars == match.matched == 15
    assert (match.n_genes, match.missing, match.duplicated) == (20, 2, 3)
    assert match.named_by == "Ensembl id and symbol"


def test_a_gene_is_what_its_id_says_not_its_symbol():
    adata = toy(ids=True)
    symbols = toy().var_names.to_numpy(copy=True)
    symbols[:3] = symbols[2::-1]
    adata.var["feature_name"] = symbols
    aligned, match = corpus.align(adata, "mine")
    assert np.array_equal(aligned[:, adata.var_names].X.toarray(), adata.X.toarray())
    [note] = match.notes
    assert "the index and feature_name of var name different genes in 2 of 20 rows" in note
    adata.var["feature_name"] = symbols[::-1]
    with pytest.raises(corpus.CorpusError, match=r"mine: the index and feature_name .* in \d+ of 20 .*take the wrong"):
        corpus.align(adata, "mine")


def test_a_column_that_names_few_genes_is_no_column_of_names():
    adata, (whole, match) = toy(), corpus.align(toy(), "mine")
    adata.var["marker_of"] = ["another"] * 18 + adata.var_names[1::-1].tolist()
    aligned, same = corpus.align(adata, "mine")
    assert same == match
    assert np.array_equal(aligned.X.toarray(), whole.X.toarray())


def test_cells_without_counts_in_matched_genes_are_dropped_with_a_warning(caplog):
    adata, whole = toy(), corpus.align(toy(), "mine")[0]
    dense = adata.X.toarray()
    dense[5, :-1], dense[5, -1] = 0, 9
    adata.X, adata.var_names = sp.csr_matrix(dense), [*adata.var_names[:-1], "novel"]
    aligned, _ = corpus.align(adata, "mine")
    assert aligned.obs_names.tolist() == [name for name in adata.obs_names if name != "cell5"]
    assert np.array_equal(aligned.X.toarray(), whole[aligned.obs_names, aligned.var_names].X.toarray())
    assert "mine: 1 of 12 cells have no count" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: toy()[[0, *range(11)]], "cell0 .*make obs_names unique"),
        (lambda: ad.AnnData(0 * toy().X, toy().obs, toy().var), "no cell has a count in any matched gene"),
        (lambda: with_values("two", dtype=object), "X holds object values, not numbers"),
        (lambda: ad.AnnData(np.zeros((0, 5), np.float32)), "0 cells x 5 genes; it must have"),
        (lambda: ad.AnnData(np.zeros((5, 0), np.float32)), "5 cells x 0 genes; it must have"),
    ],
)
@pytest.mark.filterwarnings("ignore:Observation names are not unique:UserWarning")
def test_align_refuses_and_says_why(make, message):
    with pytest.raises(corpus.CorpusError, match=f"mine: .*{message}|mine: {message}"):
        corpus.align(make(), "mine")


def test_share_of_matched_genes_is_the_users_to_set():
    few = renamed(toy(), [*toy().var_names[:9], *[f"novel{i}" for i in range(11)]])
    with pytest.raises(corpus.CorpusError, match=r"mine: only 9 of 20 genes.*at least 50%"):
        corpus.align(few, "mine")
    assert corpus.align(few, "mine", min_matched=0.45)[0].n_vars == 9
    mouse = renamed(toy(), ["Actb", "Gapdh", "Cd3d", *[f"Gm{i}" for i in range(17)]])
    with pytest.raises(corpus.CorpusError, match=r"only 0 of 20 genes \(Actb.*human.*Name genes by Ensembl id"):
        corpus.align(mouse, "mine", min_matched=0)


def test_column_is_complete_or_refused():
    adata = toy()
    assert corpus.column(adata, "mine", "cell_type", "cell_type").tolist() == ["a", "b"] * 6
    with pytest.raises(corpus.CorpusError, match=r"mine: no column 'kind' .*has 'cell_type'\. Name the right column"):
        corpus.column(adata, "mine", "kind", "cell_type")
    adata.obs["cell_type"] = ["a", None, np.nan, " ", *["b"] * 8]
    with pytest.raises(corpus.CorpusError, match=r"mine: column 'cell_type' .*missing for 3 cells; label or drop"):
        corpus.column(adata, "mine", "cell_type", "cell_type")


@given(seed=st.integers(0, 1000), n_have=st.integers(1, 12), n_want=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_to_genes_equals_a_dense_reference(seed, n_have, n_want):
    rng = np.random.default_rng(seed)
    have, want = (rng.permutation(TABLE.index[:15].to_numpy())[:n] for n in (n_have, n_want))
    dense = rng.poisson(1.0, (4, n_have)).astype(np.float32)
    expected = np.zeros((4, n_want), np.float32)
    for j, gene in enumerate(want):
        if gene in have:
            expected[:, j] = dense[:, list(have).index(gene)]
    adata = ad.AnnData(sp.csr_matrix(dense), var=pd.DataFrame(index=pd.Index(have)))
    moved = corpus.to_genes(adata, pd.Index(want))
    assert (moved.format, moved.dtype) == ("csr", np.float32)
    assert moved.has_sorted_indices
    assert np.array_equal(moved.toarray(), expected)


# Splits

SHARES = st.sampled_from([[0.5, 0.5], [0.7, 0.3], [0.95, 0.05], [0.8, 0.1, 0.1], [0.25] * 4, [1.0], [0.5, 0.0, 0.5]])
LABELS = st.lists(st.integers(1, 60), min_size=1, max_size=8).map(lambda sizes: np.repeat(np.arange(len(sizes)), sizes))


@given(labels=LABELS, shares=SHARES, seed=st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_parts_have_exact_sizes_repeat_and_hold_every_label_in_proportion(labels, shares, seed):
    part = sampling.stratified_split(labels, shares, seed=seed)
    ends = np.rint(np.cumsum(shares) * len(labels)).astype(int)
    assert np.array_equal(np.bincount(part, minlength=len(shares)), np.diff(ends, prepend=0))
    assert np.array_equal(part, sampling.stratified_split(labels, shares, seed=seed))
    held = pd.crosstab(labels, part).reindex(columns=range(len(shares)), fill_value=0).to_numpy()
    off = np.abs(held - np.outer(np.bincount(labels), np.bincount(part, minlength=len(shares)) / len(labels)))
    assert off[:, 0].max() < 1 + 1e-9
    assert off.max() < (1 if len(shares) == 2 else 2) + 1e-9


def test_seeds_divide_differently_and_labels_need_no_order():
    labels = np.array(["a", "b", "c", "a"] * 25)
    splits = [sampling.stratified_split(labels, [0.5, 0.5], seed=seed) for seed in range(5)]
    assert len({tuple(part) for part in splits}) == 5
    assert 0.2 < np.mean([part[labels == "b"] for part in splits], axis=0).mean() < 0.8


@pytest.mark.parametrize("shares", [[0.5, 0.4], [0.7, 0.7], [1.5, -0.5]])
def test_bad_shares_are_refused(shares):
    with pytest.raises(ValueError, match="add up to 1"):
        sampling.stratified_split(np.array([0, 1]), shares, seed=0)
