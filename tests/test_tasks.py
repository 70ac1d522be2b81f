"""The tasks on small made-up cells: by hand, against other implementations, and with inputs that must fail."""

import re

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import energy_distance as scipy_energy_distance
from scipy.stats import ttest_ind
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import mean_squared_error, r2_score
from sklearn.model_selection import PredefinedSplit, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.class_weight import compute_class_weight

from datawall import tasks
from datawall.cells import sampling
from datawall.models import training
from datawall.tasks import classification, finetuning, perturbation
from datawall.tasks.heads import Heads


def blobs(n_types=3, n_each=60, *, noise=0.3, seed=0):
    """Cells around the corners of a simplex ten apart, types in turn; and their types."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n_types * n_each) % n_types
    X = 10 * np.eye(n_types, 8)[labels] + noise * rng.normal(size=(len(labels), 8))
    return X.astype(np.float32), np.array([f"type {label}" for label in labels])


# Metrics and zero-shot classification


def test_metrics_by_hand():
    # a: 3 of 4 right; b: 1 of 1 right but one a is called b; the type z is only predicted, of the second cell.
    metrics = classification.classification_metrics(list("aaaaab"), list("aaazbb"))
    f1_a, f1_b = 2 * 3 / (5 + 3), 2 * 1 / (1 + 2)
    expected = {"micro_f1": 4 / 6, "macro_f1": (f1_a + f1_b) / 2, "balanced_accuracy": (3 / 5 + 1) / 2}
    expected |= {"error_rate": 2 / 6, "f1[a]": f1_a, "f1[b]": f1_b, "support[a]": 5, "support[b]": 1}
    assert metrics == pytest.approx(expected)


def test_classifiers_are_scikit_learns():
    X, y = blobs(noise=6)
    metrics = tasks.zeroshot_classification(X[::2], y[::2], X[1::2], y[1::2], k=5, more_k=(1, 15))
    for k, prefix in ((5, ""), (1, "knn1_"), (15, "knn15_")):
        expected = KNeighborsClassifier(k).fit(X[::2], y[::2]).score(X[1::2], y[1::2])
        assert metrics[prefix + "micro_f1"] == pytest.approx(expected)
        assert expected < 1
    assert metrics == tasks.zeroshot_classification(X[::2], y[::2], X[1::2], y[1::2], more_k=(1, 15))


def test_fewer_cells_than_neighbours_is_refused():
    X, y = blobs()
    with pytest.raises(ValueError, match="4 training cells are fewer than k=5 neighbours; lower k"):
        tasks.zeroshot_classification(X[:4], y[:4], X, y)
    assert tasks.zeroshot_classification(X[:4], y[:4], X, y, k=4)["micro_f1"] <= 1


# Fine-tuned classification

SHORT = training.Recipe(steps=150, batch_size=64, learning_rate=3e-3, decay="none", validate_every=50, patience=3)


def finetuned(X, y, part, seed=0, **options):
    return tasks.finetuned_classification(X, y, part, seed=seed, recipe=SHORT, **options)


def test_balanced_classes_find_the_rare_type():
    rng = np.random.default_rng(0)
    y = np.where(rng.random(2000) < 0.05, "rare", "common")
    X = rng.normal(size=(2000, 4)) + 1.0 * (y == "rare")[:, None]
    part = sampling.stratified_split(y, [0.6, 0.2, 0.2], seed=0)
    plain, balanced = (finetuned(X, y, part, class_weight=weight) for weight in (None, "balanced"))
    assert balanced["balanced_accuracy"] > plain["balanced_accuracy"] + 0.1
    assert balanced["micro_f1"] < plain["micro_f1"]
    with pytest.raises(ValueError, match="class_weight 'heavy' is neither None nor 'balanced'"):
        finetuned(X, y, part, class_weight="heavy")


def test_balanced_weights_are_scikit_learns():
    labels = np.array(["a"] * 6 + ["b"] * 2 + ["c"])
    part = np.array([0] * 6 + [0, 0] + [2])
    part[0] = 1
    folds = finetuning._Folds(labels, part, "balanced")
    expected = compute_class_weight("balanced", classes=np.array(["a", "b"]), y=labels[part == 0])
    np.testing.assert_allclose(folds.weight.cpu()[0, :2], expected, rtol=1e-6)


def test_a_head_has_the_published_shape():
    head = Heads(1, 10, 4)
    assert [tuple(weight.shape) for weight in head.parameters()] == [(1, 10, 128), (1, 1, 128), (1, 4, 128), (1, 4, 1)]


@pytest.mark.parametrize("class_weight", [None, "balanced"])
def test_gradients_of_heads_are_autograds(class_weight):
    X, y = blobs()
    part = np.stack([np.roll(np.arange(len(y)) % 5 % 3, i) for i in range(2)])
    folds = finetuning._Folds(y, part, class_weight)
    heads = Heads(2, 8, 3).to(training.device())
    with torch.no_grad():
        heads.last_weight[1] *= 2
    rows = folds.alike(0)
    inputs = torch.from_numpy(X[rows]).to(training.device())

    def gradients(loss_of):
        torch.manual_seed(0)
        heads.zero_grad()
        loss = loss_of()
        loss.backward()
        return [loss.detach(), *(weight.grad for weight in heads.parameters())]

    def judge(logits):
        losses, slope = folds.loss(logits, rows)
        return losses.sum(), slope

    by_hand = gradients(lambda: heads.loss(inputs, judge))
    torch.testing.assert_close(by_hand, gradients(lambda: folds.loss(heads(inputs), rows)[0].sum()))


def test_heads_side_by_side_are_each_as_alone():
    X, y = blobs(n_each=39, noise=5)
    fold = np.arange(len(y)) // 3 % 3
    parts = np.stack([np.where(fold == i, 2, np.where(fold == (i + 1) % 3, 1, 0)) for i in range(3)])
    recipe = training.Recipe(steps=300, batch_size=16, learning_rate=0.01, decay="none", validate_every=10, patience=2)

    def outputs(part):
        folds = finetuning._Folds(y, part, None)
        scaled = torch.stack([finetuning._scaling(X[rows])(torch.from_numpy(X)) for rows in folds.rows[0]])
        return finetuning._fit_heads(scaled, folds, 0, recipe)(scaled).detach().cpu()

    together = outputs(parts)
    for i, part in enumerate(parts):
        torch.testing.assert_close(together[i], outputs(part)[0], rtol=1e-3, atol=1e-3)


def test_every_cell_is_tested_once_by_the_other_folds():
    X, y = blobs(n_each=60, noise=5)
    fold = sampling.stratified_split(y, [1 / 3] * 3, seed=0)
    parts = np.stack([np.where(fold == i, 2, np.where(np.arange(len(y)) % 5 == 0, 1, 0)) for i in range(3)])
    metrics = finetuned(X, y, parts)
    assert sum(value for name, value in metrics.items() if name.startswith("support")) == len(y)
    assert metrics["micro_f1"] == (metrics.predicted == y).mean()
    shuffled = np.random.default_rng(0).permutation(y)
    assert finetuned(X, shuffled, parts)["micro_f1"] < 0.5


def test_crossvalidated_neighbours_are_scikit_learns():
    X, y = blobs(n_each=50, noise=5)
    half = sampling.stratified_split(y, [0.5, 0.5], seed=0)
    expected = cross_val_predict(KNeighborsClassifier(5), X, y, cv=PredefinedSplit(half))
    metrics = tasks.classification.crossvalidated_classification(X, y, half, more_k=[15])
    np.testing.assert_array_equal(metrics.predicted, expected)
    assert metrics["micro_f1"] == (expected == y).mean()
    probe = make_pipeline(StandardScaler(), LogisticRegression(solver="newton-cg"))
    expected = cross_val_predict(probe, X, y, cv=PredefinedSplit(half))
    assert metrics["probe_micro_f1"] == (expected == y).mean()


def test_head_learns_separable_types_but_no_labels_of_test_cells():
    X, y = blobs(n_each=100)
    part = sampling.stratified_split(y, [0.8, 0.1, 0.1], seed=0)
    metrics = finetuned(X, y, part)
    assert metrics["macro_f1"] == metrics["f1[type 0]"] == 1
    assert metrics["error_rate"] == 0
    # Scale and offset of a column mean nothing to the head.
    assert finetuned(X * 1e3 + 50, y, part)["micro_f1"] == 1
    turned = {"type 0": "type 1", "type 1": "type 2", "type 2": "type 0"}
    y = np.where(part == 2, [turned[label] for label in y], y)
    assert finetuned(X, y, part)["micro_f1"] == 0


def test_same_seed_gives_the_same_head_and_another_seed_another():
    X, y = blobs(noise=8, n_each=300)
    part = sampling.stratified_split(y, [0.4, 0.1, 0.5], seed=0)
    scores = [finetuned(X, y, part, seed) for seed in (0, 0, 1, 2, 3)]
    assert scores[0] == scores[1]
    assert len({score["micro_f1"] for score in scores}) > 1


@pytest.mark.parametrize(("absent", "name"), [(0, "train"), (1, "validation"), (2, "test")])
def test_missing_part_is_named(absent, name):
    X, y = blobs()
    part = np.array([kept for kept in range(3) if kept != absent])[np.arange(len(y)) % 2]
    with pytest.raises(ValueError, match=f"no cell in the {name} part; use a larger data set"):
        finetuned(X, y, part)


# Perturbation response


def contexts_on_a_line(n=80, n_genes=40, seed=0):
    """Five contexts in a row, control and treated cells of each, and one shift common to all.

    The embedding is a context's place in the row, so that a head can tell what an unseen context is like.
    """
    rng = np.random.default_rng(seed)
    base, direction, shift = rng.normal(3, 1, n_genes), rng.normal(0, 0.4, n_genes), rng.normal(0, 1, n_genes)
    place = np.repeat(np.arange(5), 2 * n)
    treated = np.tile(np.arange(2 * n) % 2 == 1, 5)
    X = base + np.outer(place, direction) + np.outer(treated, shift) + rng.normal(0, 0.1, (len(place), n_genes))
    embedding = np.column_stack([place + rng.normal(0, 0.05, len(place)), rng.normal(0, 0.05, len(place))])
    return embedding, X, treated, np.array([f"context {p}" for p in place])


@pytest.fixture
def predictions(monkeypatch):
    """What was predicted, by call."""
    captured, metrics = [], perturbation.Response.metrics

    def spy(response, predicted):
        captured.append(predicted)
        return metrics(response, predicted)

    monkeypatch.setattr(perturbation.Response, "metrics", spy)
    return captured


def test_held_out_treated_cells_never_reach_the_prediction(predictions):
    embedding, X, treated, context = contexts_on_a_line()
    secret = treated & (context == "context 1")
    changed_X, changed_embedding = X.copy(), embedding.copy()
    changed_X[secret] = 99
    changed_embedding[treated] = np.nan
    one = tasks.perturbation_response(embedding, X, treated, context, "context 1", seed=0)
    other = tasks.perturbation_response(changed_embedding, changed_X, treated, context, "context 1", seed=0)
    assert np.array_equal(predictions[0], predictions[1])
    assert other["mse"] > 100 * one["mse"]
    # Treated cells of the other contexts do.
    changed_X[treated & (context == "context 2")] += 1
    tasks.perturbation_response(embedding, changed_X, treated, context, "context 1", seed=0)
    assert np.abs(predictions[2] - predictions[0]).max() > 0.1


def test_predictions_do_not_depend_on_the_scale_of_an_embedding(predictions):
    embedding, *cells = contexts_on_a_line()
    for scale in ([1, 1], [1e3, 1e-3]):
        tasks.perturbation_response(embedding * scale, *cells, "context 1", seed=0)
    np.testing.assert_allclose(*predictions, atol=1e-3)


def test_response_metrics_by_hand():
    control, treated = np.array([1.0, 2, 3, 6]), np.array([2.0, 2, 5, 5])
    perfect = perturbation.Response(treated, control).metrics(treated)
    best = {"mse": 0, "pearson_r": 1, "pearson_delta": 1, "direction_accuracy": 3 / 4, "energy_distance": 0}
    assert {name: perfect[name] for name in best} == pytest.approx(best)
    nothing = perturbation.Response(treated, control).metrics(control)
    expected = {"mse": (1 + 0 + 4 + 1) / 4, "pearson_r": np.corrcoef(control, treated)[0, 1]}
    expected |= {"pearson_delta": 0, "direction_accuracy": 0, "energy_distance": 2 * np.sqrt(6)}
    assert {name: nothing[name] for name in expected} == pytest.approx(expected)
    assert dict(nothing) == pytest.approx(nothing.chance)
    opposite = perturbation.Response(treated, control).metrics(2 * control - treated)
    assert opposite["pearson_delta"] == pytest.approx(-1)
    assert opposite["direction_accuracy"] == 0


def test_metrics_of_top_genes_see_those_alone():
    rng = np.random.default_rng(0)
    control, treated = rng.normal(size=(2, 200, 300))
    change = np.where(np.arange(300) < 50, np.resize([2.0, -2.0, 1.0], 300), 0)
    treated += change
    predicted = control + change
    predicted[:, 50:] += 5
    response = perturbation.Response(treated, control)
    assert dict(response.metrics(control)) == pytest.approx(response.chance)
    metrics = response.metrics(predicted)
    assert metrics["mse_top50"] < 0.1 < metrics["mse"]
    assert metrics["pearson_delta_top50"] > 0.95 > metrics["pearson_delta"]
    assert metrics["direction_accuracy"] == 1
    predicted[:, :10] = control[:, :10] - change[:10]
    assert perturbation.Response(treated, control).metrics(predicted)["direction_accuracy"] == pytest.approx(0.8)


def test_differential_genes_are_those_of_welchs_test():
    rng = np.random.default_rng(0)
    treated, control = rng.normal(size=(40, 90)), rng.normal(0.3, 2, size=(60, 90))
    expected = np.argsort(-np.abs(ttest_ind(treated, control, equal_var=False).statistic))
    np.testing.assert_array_equal(perturbation.differential_genes(treated, control, 90), expected)
    treated[:, 3] = control[:, 3] = 1.0  # no difference, no spread
    assert perturbation.differential_genes(treated, control, 90)[-1] == 3
    treated[:, 3] = 2.0
    assert perturbation.differential_genes(treated, control, 1).tolist() == [3]
    assert perturbation.differential_genes(np.array([[0.0, 3, -4]]), control[:, :3] * 0, 2).tolist() == [2, 1]


def test_energy_distance_in_one_dimension_is_twice_the_squared_distance_of_distributions():
    energy_distance = lambda x, y: perturbation.energy_distance(y, np.ones((1, len(y))))(x)[0]  # noqa: E731
    # Székely and Rizzo 2013: on a line, 2 times the integral of the squared difference of distribution functions.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=400), rng.normal(1.0, 2.0, size=400)
    with_itself = np.abs(np.subtract.outer(x, x)).mean() / 399 + np.abs(np.subtract.outer(y, y)).mean() / 399
    expected = scipy_energy_distance(x, y) ** 2 - with_itself
    assert energy_distance(x[:, None], y[:, None]) == pytest.approx(expected)
    assert expected > 0.1
    same = [energy_distance(*rng.normal(size=(2, 300, 5))) for _ in range(20)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(20)


@pytest.mark.parametrize("matching", ["nearest", "ot"])
def test_matched_cells_carry_what_tells_cells_of_a_context_apart(matching):
    # In every context a hidden state, seen in the embedding, decides by how much a gene rises: the mean hides it.
    rng = np.random.default_rng(0)
    n = 800
    state, treated = rng.normal(size=n), np.arange(n) % 2 == 1
    context = np.resize(np.repeat(["a", "b"], 2), n)
    X = rng.normal(0, 0.1, (n, 5))
    X[:, 0] += np.where(treated, 2 * state, 0)
    embedding = np.column_stack([state, rng.normal(0, 0.05, n)])
    given = {"seed": 0, "recipe": training.Recipe(steps=400, batch_size=64, learning_rate=5e-3)}
    matched, again, mean = (
        tasks.perturbation_response(embedding, X, treated, context, "a", matching=how, **given)
        for how in (matching, matching, "mean")
    )
    assert matched["energy_distance"] < 0.5 * mean["energy_distance"]
    assert matched == again


def test_matching_pairs_cells_of_one_context():
    rng = np.random.default_rng(0)
    embedding, treated = rng.normal(size=(30, 3)), np.arange(30) % 3 == 0
    control, other = (np.flatnonzero(each) for each in (~treated, treated))
    distance = cdist(embedding[control], embedding[other])
    pairs = perturbation._matched(embedding, treated, np.full(30, True), "nearest", rng)
    assert sorted(pairs[1]) == other.tolist()
    assert {(i, j) for i, j in pairs.T} == {(control[distance[:, j].argmin()], cell) for j, cell in enumerate(other)}
    pairs = perturbation._matched(embedding, treated, np.full(30, True), "ot", rng)
    assert len(set(pairs[0])) == len(set(pairs[1])) == len(other)
    cost = lambda control, other: ((embedding[control] - embedding[other]) ** 2).sum()  # noqa: E731
    assert cost(*pairs) < min(cost(rng.permutation(control)[: len(other)], other) for _ in range(200))


def test_unknown_matching_is_refused():
    embedding, X, treated, context = contexts_on_a_line(n=4)
    with pytest.raises(ValueError, match="matching 'best' is none of 'mean', 'nearest', 'ot'"):
        tasks.perturbation_response(embedding, X, treated, context, "context 1", seed=0, matching="best")


def drawn_cells(n, rng, n_genes=300):
    """Control and treated cells of which the means are known, and the true mean of the treated."""
    base, spread = rng.gamma(1, 1, n_genes), rng.uniform(0.2, 1.2, n_genes)
    truth = base + np.where(rng.random(n_genes) < 0.2, rng.normal(0, 0.5, n_genes), 0)
    return base + spread * rng.normal(size=(n, n_genes)), truth + spread * rng.normal(size=(n, n_genes)), truth


@pytest.mark.parametrize("n", [10, 80])
def test_the_truth_reaches_the_ceiling_and_nothing_exceeds_it(n):
    rng = np.random.default_rng(0)
    reached, ceilings = [], []
    for _ in range(40):
        control, treated, truth = drawn_cells(n, rng)
        reached.append(perturbation.Response(treated, control).metrics(truth))
        ceilings.append(perturbation.oracle(treated, control))
    lower = {"mse", "mse_top50", "mse_weighted", "energy_distance"}
    for name in reached[0]:
        gap = np.array([of[name] - at[name] for of, at in zip(reached, ceilings, strict=True)])
        gap = -gap if name in lower else gap
        error = gap.std(ddof=1) / np.sqrt(len(gap))
        assert gap.mean() < max(3 * error, 0.002), name
        if name in ("mse", "pearson_r", "pearson_delta"):  # of all genes alike, the ceiling is what the truth reaches
            assert abs(gap.mean()) < max(3 * error, 0.002), name


def test_the_ceiling_is_that_of_corrected_halves():
    rng = np.random.default_rng(1)
    control, treated, _ = drawn_cells(60, rng, 2000)
    before = control.mean(axis=0)
    halves = []
    for _ in range(200):
        cells = rng.permutation(60)
        one, other = (treated[half].mean(axis=0) - before for half in np.split(cells, 2))
        halves.append(np.corrcoef(one, other)[0, 1])
    half = np.mean(halves)
    ceiling = perturbation.oracle(treated, control)
    assert ceiling["pearson_delta"] == pytest.approx(np.sqrt(2 * half / (1 + half)), abs=0.002)
    assert ceiling["mse"] == pytest.approx(treated.var(axis=0, ddof=1).mean() / 60)
    with pytest.raises(ValueError, match="1 treated cells have no spread"):
        perturbation.oracle(treated[:1], control)


def test_weighted_metrics_are_scikit_learns():
    rng = np.random.default_rng(0)
    control, treated, truth = drawn_cells(50, rng)
    metrics = perturbation.Response(treated, control).metrics(truth)
    score = np.abs(ttest_ind(treated, control, equal_var=False).statistic)
    weights = ((score - score.min()) / np.ptp(score)) ** 2
    change, predicted = (mean - control.mean(axis=0) for mean in (treated.mean(axis=0), truth))
    expected = [score_of(change, predicted, sample_weight=weights) for score_of in (mean_squared_error, r2_score)]
    assert [metrics[name] for name in ("mse_weighted", "r2_delta_weighted")] == pytest.approx(expected, rel=1e-4)
    assert perturbation.response_weights(treated, control).sum() == pytest.approx(1)
    same = perturbation.response_weights(control, control)
    np.testing.assert_allclose(same, 1 / 300)


def test_contexts_are_told_apart_by_what_was_predicted():
    rng = np.random.default_rng(0)
    control, treated, truth = drawn_cells(50, rng)
    own = truth - control.mean(axis=0)
    others = own + rng.normal(0, 0.5, (4, 300))

    def discrimination(change):
        prediction = control.mean(axis=0) + change
        return perturbation.Response(treated, control, others).metrics(prediction)["context_discrimination"]

    assert discrimination(own) == 1
    assert discrimination(others[0]) < 1
    assert discrimination(others.mean(axis=0) * 9) <= 0.5
    assert "context_discrimination" not in perturbation.Response(treated, control).metrics(truth)


def test_changes_are_those_of_the_means_of_each_context():
    X = np.array([[1.0, 1], [1, 3], [5, 5], [5, 2], [5, 6], [5, 7], [5, 8], [9, 9]])
    treated, context = np.array([0, 0, 0, 1, 1, 1, 1, 1], bool), np.array(list("aababbbc"))
    np.testing.assert_allclose(perturbation.changes(X, treated, context, ["a", "b"]), [[4, 0], [0, 2]])


def test_usable_contexts_have_control_and_treated_cells():
    context = np.array(["c", "c", "a", "a", "b", "d"])
    treated = np.array([True, False, False, True, True, False])
    assert perturbation.usable_contexts(treated, context) == ["a", "c"]


@pytest.mark.parametrize(
    ("held_out", "kept", "message"),
    [
        ("nobody", "[0-4]", "cannot hold out 'nobody': .*context 0.*at least two"),
        ("context 3", "[0-4]", "cannot hold out 'context 3': .*context 0.*at least two"),
        ("context 0", "0", "at least two are needed"),
    ],
)
def test_context_that_cannot_be_held_out_is_named(held_out, kept, message):
    *arrays, context = contexts_on_a_line(n=4)
    treated = arrays[-1]
    some = [bool(re.fullmatch(f"context {kept}", name)) for name in context] & (~treated | (context != "context 3"))
    with pytest.raises(ValueError, match=message):
        tasks.perturbation_response(*(array[some] for array in arrays), context[some], held_out, seed=0)
