import contextlib
import warnings
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from datawall.cells import expression
from datawall.models import hyperparameters, scimilarity
from datawall.models.scimilarity import SCimilarity, TripletAutoencoder, kinship, sampling_weights, weighted_batches
from datawall.models.sparse import Cells, DenseCells

N_GENES = 60
SMALL = {"n_hidden": [12, 8], "n_latent": 4, "batch_size": 16, "keep": "last"}
TERMS = [  # what follows id and name
    ("cell", ""),
    ("lymphocyte", 'def: "A cell: with a colon." [GOC:x]\nis_a: CL:0 {is_inferred="true"} ! cell'),
    ("T cell", 'synonym: "T-lymphocyte" EXACT []\nis_a: CL:1 ! lymphocyte\nrelationship: develops_from CL:5 ! precursor'
     "\nrelationship: part_of UBERON:9 ! blood"),
    ("CD4-positive, alpha-beta T cell", "is_a: CL:2 ! T cell"),
    ("B cell", "is_a: CL:1\nintersection_of: CL:3 ! no relation of the term's own"),
    ("precursor", ""),
    ("T cell of old", "is_a: CL:2 ! T cell\nis_obsolete: true"),
]  # fmt: skip
ONTOLOGY = "format-version: 1.2\nontology: cl/cl-basic\n\n"
ONTOLOGY += "\n".join(f"[Term]\nid: CL:{n}\nname: {name}\n{rest}\n" for n, (name, rest) in enumerate(TERMS))
ONTOLOGY += "\n[Typedef]\nid: part_of\nname: part of\nis_a: CL:4\n"


def simulated(n_cells=40, n_genes=N_GENES, seed=0):
    """Counts of three cell types from two studies."""
    rng = np.random.default_rng(seed)
    types = rng.integers(0, 3, n_cells)
    rates = np.random.default_rng(99).gamma(0.3, 1, (3, n_genes))[types]
    counts = rng.poisson(rates).astype(np.float32)
    counts[:, 0] += 1  # no cell without counts
    obs = pd.DataFrame({"cell_type": np.array(["T cell", "B cell", "precursor"])[types]})
    return sp.csr_matrix(counts), obs.assign(dataset_id=rng.integers(0, 2, n_cells).astype(str))


def fitted(n_cells=40, steps=8, seed=0, obs=None, **settings):
    counts, simulated_obs = simulated(n_cells)
    model = SCimilarity(**SMALL | settings)
    history = model.fit(counts, simulated_obs if obs is None else obs, steps=steps, seed=seed)
    return model, history


def autoencoder(**settings):
    torch.manual_seed(0)
    without_dropout = {"dropout": 0.0, "input_dropout": 0.0}
    return TripletAutoencoder(N_GENES, hyperparameters.SCimilarity(**SMALL | without_dropout | settings))


def batch(n_cells=40, form=Cells):
    """Cells of a batch, dense and as the library has them, their types and studies, pairs and which are negatives."""
    counts, obs = simulated(n_cells)
    X = expression.lognormalise(counts)
    types, studies = (torch.from_numpy(pd.factorize(obs[name])[0]) for name in ("cell_type", "dataset_id"))
    pairs = ((types[:, None] == types) & (studies[:, None] != studies)).triu(1).nonzero(as_tuple=True)
    return torch.from_numpy(X.toarray()), form.of(X), types, studies, pairs, types[:, None] != types


def squared_distances(latent):
    return (latent[:, None] - latent).square().sum(2)


def on_the_sphere(n_cells, n_latent=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n_cells, n_latent, generator=generator))


def semihard_by_hand(distance, types, studies, margin):
    """Negatives that suit each pair, one pair and one cell after the other."""
    suitable = {}
    for label in set(types):
        of_label = [i for i, each in enumerate(types) if each == label]
        for a, p in combinations(of_label, 2):
            if studies[a] != studies[p]:
                bound = float(np.float32(distance[a][p]) + np.float32(margin))
                farther = [n for n in range(len(types)) if distance[a][p] < distance[a][n] < bound]
                found = [n for n in farther if types[n] != label]
                if found:
                    suitable[a, p] = found
    return suitable


@settings(deadline=None)
@given(st.integers(1, 25), st.integers(1, 5), st.integers(1, 4), st.floats(1e-3, 6), st.integers(0, 2**31))
def test_triplets_are_those_found_by_hand(n_cells, n_types, n_studies, margin, seed):
    rng = np.random.default_rng(seed)
    types, studies = rng.integers(0, n_types, n_cells), rng.integers(0, n_studies, n_cells)
    # Rounded, so that distances are equal now and then.
    distance = squared_distances((on_the_sphere(n_cells, seed=seed) * 4).round() / 4)
    suitable = semihard_by_hand(distance.tolist(), types.tolist(), studies.tolist(), margin)
    same, apart = (each[:, None] == each for each in map(torch.from_numpy, (types, studies)))
    pairs = (same & ~apart).triu(1).nonzero(as_tuple=True)
    negative, found = scimilarity.semihard_negatives(distance, *pairs, ~same, margin)
    pairs = list(zip(*(each.tolist() for each in pairs), strict=True))
    assert {pair for pair, there in zip(pairs, found.tolist(), strict=True) if there} == set(suitable)
    assert all(n in suitable.get(pair, range(n_cells)) for pair, n in zip(pairs, negative.tolist(), strict=True))


def test_the_negative_is_chosen_evenly():
    types = [0, 0, *[1] * 8]
    distance = squared_distances(on_the_sphere(10, seed=3))
    suitable = semihard_by_hand(distance.tolist(), types, range(10), 2.0)[0, 1]
    assert 3 < len(suitable) < 8
    types = torch.tensor(types)
    torch.manual_seed(0)
    pair, negatives = torch.tensor([[0], [1]]), types[:, None] != types
    draws = [scimilarity.semihard_negatives(distance, *pair, negatives, 2.0)[0] for _ in range(3000)]
    counts = torch.bincount(torch.cat(draws), minlength=10)[suitable]
    assert counts.sum() == 3000
    expected = 3000 / len(suitable)
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


@pytest.mark.parametrize("form", [Cells, DenseCells])
@pytest.mark.parametrize("settings", [{}, {"l1_layer": "last"}, {"n_hidden": [9]}, {"triplet_weight": 1.0, "l1": 0.0}])
def test_the_loss_and_its_gradients_are_those_of_dense_cells(settings, form):
    module = autoencoder(**{"triplet_weight": 0.3, "l1": 0.01, "margin": 0.5} | settings)
    h, (x, cells, types, _, pairs, negatives) = module.h, batch(form=form)
    torch.manual_seed(1)
    loss = module(cells, *pairs, negatives, 0.1)
    loss.backward()
    ours = {name: weight.grad.clone() for name, weight in module.named_parameters() if weight.grad is not None}
    module.zero_grad()
    first, last = module.encoder[0], module.reconstruction
    latent = F.normalize(module.encoder[1:](x @ first.weight + first.bias))
    x_hat = F.linear(module.decoder(latent), last.weight, last.bias)
    torch.manual_seed(1)
    negative, found = scimilarity.semihard_negatives(2 - 2 * latent @ latent.T, *pairs, negatives, 0.5)
    anchor, positive, negative = (each[found] for each in (*pairs, negative))
    assert 20 < len(anchor) < len(found)
    triplet = F.triplet_margin_loss(latent[anchor], latent[positive], latent[negative], margin=0.5, p=2)
    weight = first.weight if h.l1_layer == "first" else module.encoder[-1].weight
    reference = h.triplet_weight * triplet + (1 - h.triplet_weight) * F.mse_loss(x_hat, x)
    reference = reference + h.l1 * 0.1 * weight.abs().sum()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=0)
    reference.backward()
    for name, each in module.named_parameters():
        torch.testing.assert_close(ours[name], each.grad, rtol=1e-3, atol=1e-6)
    with warnings.catch_warnings(action="ignore"):
        from pytorch_metric_learning import distances, losses, reducers
    distance = distances.LpDistance(normalize_embeddings=False)
    theirs = losses.TripletMarginLoss(0.5, distance=distance, reducer=reducers.MeanReducer())
    torch.testing.assert_close(theirs(latent, types, (anchor, positive, negative)), triplet, rtol=1e-4, atol=1e-5)


def test_without_triplets_the_rest_of_the_loss_is_left():
    module, (x, cells, _, _, pairs, negatives) = autoencoder(triplet_weight=0.25, l1=0.0), batch()
    whole = module(cells, *pairs, torch.zeros_like(negatives), 0.1)
    latent = module.encode(cells)
    x_hat = F.linear(module.decoder(latent), module.reconstruction.weight, module.reconstruction.bias)
    torch.testing.assert_close(whole, 0.75 * F.mse_loss(x_hat, x), rtol=1e-4, atol=0)


def test_the_input_is_dropped_in_training_alone():
    module, (_, cells, *_, pairs, negatives) = autoencoder(input_dropout=0.4), batch(400)
    seen = []
    module.encoder[0].register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    module(cells, *pairs, negatives, 0.1)
    assert len(seen[0].data) / len(cells.data) == pytest.approx(0.6, abs=0.03)
    assert set(seen[0].data.tolist()) <= set((cells.data * (1 / 0.6)).tolist())
    module.eval()(cells, *pairs, negatives, 0.1)
    assert seen[1] is cells


def test_layers_come_in_the_originals_order():
    module = TripletAutoencoder(N_GENES, hyperparameters.SCimilarity(n_hidden=[12, 8], n_latent=4))
    names = [[type(layer).__name__ for layer in part] for part in (module.encoder, module.decoder)]
    block = ["Dropout", "Linear", "BatchNorm1d", "PReLU"]
    assert names == [["SparseLinear", *block[2:], *block, "Linear"], [*block[1:], *block]]
    assert module.encoder[3].p == 0.5


@pytest.fixture
def ontology(tmp_path):
    path = tmp_path / "cl.obo"
    path.write_text(ONTOLOGY)
    return path


def test_kinship_follows_every_relation(ontology):
    labels = np.array(["lymphocyte", "T cell", "CD4-positive, alpha-beta T cell", "B cell", "precursor", "cell"])
    kin = pd.DataFrame(kinship(labels, ontology), index=labels, columns=labels)
    strangers = {frozenset(pair) for pair in combinations(labels, 2) if not kin.loc[pair]}
    assert (kin == kin.T).all(axis=None)
    assert np.diag(kin).all()
    expected = [("T cell", "B cell"), ("CD4-positive, alpha-beta T cell", "B cell"), ("lymphocyte", "precursor")]
    expected += [("B cell", "precursor"), ("cell", "precursor")]
    assert strangers == set(map(frozenset, expected))


def test_an_ontology_may_have_circles_and_no_header(tmp_path):
    terms = [f"[Term]\nid: {i}\nname: {i}\nis_a: {(i + 1) % 3}\n" for i in range(3)]
    (tmp_path / "circle.obo").write_text("\n".join(terms))
    assert kinship(np.array(["0", "1", "2"]), tmp_path / "circle.obo").all()


def test_types_that_the_ontology_does_not_know_are_named(ontology):
    with pytest.raises(ValueError, match=r"cl\.obo has no term named 'part of', 'T cell of old'; rename these"):
        kinship(np.array(["T cell", "part of", "T cell of old"]), ontology)
    obs = simulated()[1].replace("B cell", "unknown")
    with pytest.raises(ValueError, match="no term named 'unknown'"):
        fitted(obs=obs, ontology=str(ontology))


def test_weights_of_the_sampler_by_hand():
    weights = sampling_weights(np.array([0] * 3 + [1]), np.array([0, 0, 1, 1]))
    study = 1 / np.log1p(2 / 1e6)
    common, rare = study / np.log1p(3 / 1e4), study / np.log1p(1 / 1e4)
    np.testing.assert_allclose(weights, [common] * 3 + [rare])
    labels = np.repeat([0, 1], [100_000, 1])
    weights = sampling_weights(labels, np.zeros_like(labels))  # capped
    np.testing.assert_allclose(weights, 1 / (np.log1p(10.0) * np.log1p(0.100001)) * np.where(labels, 2, 1))


def test_cells_are_drawn_by_weight_and_follow_from_seed_and_step():
    weights = np.array([1.0, 0.0, 3.0, 6.0])
    drawn = list(weighted_batches(weights, 1000, 20, seed=3))
    assert {each.shape for each in drawn} == {(1000,)}
    share = np.bincount(np.concatenate(drawn), minlength=4) / 20_000
    np.testing.assert_allclose(share, weights / 10, atol=0.02)
    assert share[1] == 0
    again = list(weighted_batches(weights, 1000, 20, seed=3))
    np.testing.assert_array_equal(again, drawn)
    assert len(np.unique(drawn, axis=0)) == 20
    assert (drawn[5] != next(weighted_batches(weights, 1000, 1, seed=4))).any()


@settings(deadline=None)
@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=50), st.integers(0, 2**31))
def test_rows_drawn_are_always_rows(weights, seed):
    drawn = next(weighted_batches(np.array(weights), 64, 1, seed=seed))
    assert drawn.min() >= 0
    assert drawn.max() < len(weights)


@pytest.fixture
def relations(monkeypatch):
    """Pairs and negatives of each step, in the order of the batch."""
    seen, mine = [], scimilarity.semihard_negatives

    def recorded(distance, anchor, positive, negatives, margin):
        seen.append((torch.zeros_like(negatives).index_put((anchor, positive), torch.tensor(True)), negatives))
        return mine(distance, anchor, positive, negatives, margin)

    monkeypatch.setattr(scimilarity, "semihard_negatives", recorded)
    return seen


def drawn_in_step(obs, step, seed=0, batch_size=16):
    labels, studies = (pd.factorize(obs[name])[0] for name in ("cell_type", "dataset_id"))
    rows = list(weighted_batches(sampling_weights(labels, studies), batch_size, step + 1, seed=seed))[step]
    return obs.iloc[rows]


def test_pairs_are_of_one_type_and_two_studies_and_negatives_of_another_type(relations):
    _, obs = simulated()
    fitted()
    for step, (pairs, negatives) in enumerate(relations):
        cells = drawn_in_step(obs, step)
        for a, p in np.ndindex(16, 16):
            same_type = cells["cell_type"].iloc[a] == cells["cell_type"].iloc[p]
            same_study = cells["dataset_id"].iloc[a] == cells["dataset_id"].iloc[p]
            assert pairs[a, p] == (a < p and same_type and not same_study)
            assert negatives[a, p] == (not same_type)


def test_kin_are_no_negatives(relations, ontology):
    fitted(ontology=str(ontology))
    cells = drawn_in_step(simulated()[1], 0)["cell_type"].to_numpy()
    for a, n in np.ndindex(16, 16):
        assert relations[0][1][a, n] == ({cells[a], cells[n]} in ({"T cell", "B cell"}, {"precursor", "B cell"}))


@pytest.mark.parametrize("columns", [{"dataset_id": None}, {"dataset_id": "one"}, {"dataset_id": np.nan}])
def test_pairs_lie_within_the_study_where_there_is_one_only(columns, relations):
    _, obs = simulated()
    obs = obs.drop(columns="dataset_id") if columns["dataset_id"] is None else obs.assign(**columns)
    fitted(obs=obs)
    pairs, negatives = relations[0]
    assert pairs.any()
    assert (pairs == (~negatives).triu(1)).all()


def test_batches_tell_studies_apart_where_there_is_no_dataset(relations):
    _, obs = simulated()
    renamed = obs.rename(columns={"dataset_id": "batch"})
    for each in (obs, renamed, obs.assign(batch="one"), renamed.assign(dataset_id="one")):
        fitted(obs=each)
    for other in (1, 2, 3):
        for ours, expected in zip(relations[8 * other : 8 * other + 8], relations[:8], strict=True):
            assert (ours[0] == expected[0]).all()


def test_a_subset_of_one_type_has_no_triplets():
    obs = simulated()[1].assign(cell_type="T cell")
    model, history = fitted(obs=obs, triplet_weight=1.0, l1=0.0)
    assert not history.loss.any()
    assert np.isfinite(fitted(obs=obs)[1].loss).all()
    assert np.isfinite(model.embed(simulated()[0])).all()


def test_clear_errors():
    _, obs = simulated()
    with pytest.raises(ValueError, match=r"there is no column obs\['cell_type'\]: label every cell .* or leave"):
        fitted(obs=obs.drop(columns="cell_type"))
    with pytest.raises(ValueError, match="2 cells have no value in obs"):
        fitted(obs=obs.assign(cell_type=[None, None, *obs["cell_type"][2:]]))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fitted(ontology="nowhere.obo")


def test_labels_may_be_categories():
    counts, obs = simulated()
    plain = fitted()[0].embed(counts)
    np.testing.assert_array_equal(fitted(obs=obs.astype("category"))[0].embed(counts), plain)


def test_the_embedding_is_the_encoders_output_on_the_unit_sphere():
    model, (x, *_) = fitted()[0], batch()
    first = model.module.encoder[0]
    expected = F.normalize(model.module.encoder[1:](x @ first.weight + first.bias)).detach().numpy()
    embedding = model.embed(simulated()[0])
    np.testing.assert_allclose(embedding, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embedding, axis=1), 1, rtol=1e-5)


def test_the_loss_is_right_under_autocast():
    module, (_, cells, *_, pairs, negatives) = autoencoder(triplet_weight=0.3), batch()
    found = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = module(cells, *pairs, negatives, 0.1)
        assert loss.dtype == torch.float32
        loss.backward()
        found.append(loss.item())
    assert found[1] == pytest.approx(found[0], rel=0.02)
    assert all(weight.grad.isfinite().all() for weight in module.parameters())


def test_a_step_never_waits_for_the_device(monkeypatch):
    """On the meta device there are no values, so what asks for one fails (see test_transformer)."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know that device
    *pairs, negatives = (each.to("meta") for each in (*batch()[4], batch()[5]))
    module = autoencoder(input_dropout=0.4).to("meta").train()
    module(DenseCells(torch.empty(40, N_GENES, device="meta")), *pairs, negatives, 0.1).backward()
    assert all(weight.grad is not None for weight in module.encoder.parameters())


def test_cells_that_were_drawn_are_counted():
    """With replacement, so that some come again before others come at all."""
    _, obs = simulated(120)
    _, history = fitted(120, steps=4)
    labels, studies, _ = scimilarity._codes(obs)
    drawn = np.concatenate(list(weighted_batches(sampling_weights(labels, studies), 16, 4, seed=0)))
    assert history.unique_cells == len(set(drawn.tolist())) < 64
