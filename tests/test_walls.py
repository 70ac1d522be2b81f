"""Which wall a model meets: the runs that tell, the surface fitted to them, and the verdict."""

import numpy as np
import pandas as pd
import pytest
import real
import scipy.sparse as sp
import torch
from benchmarks.which_wall import design, named, planted, repeated
from scipy import stats
from small import small_study

from datawall import models
from datawall.analysis import results, walls
from datawall.cells import sampling
from datawall.models import ssl
from datawall.reading.plots import curves, maps
from datawall.study import evaluation, params, questions

# The contrastive twin


def test_info_nce_is_the_mean_of_what_a_loop_over_cells_gives():
    first, second = np.random.default_rng(0).normal(size=(2, 9, 4))
    unit = [view / np.linalg.norm(view, axis=1)[:, None] for view in (first, second)]
    losses = []
    for mine, others in (unit, unit[::-1]):
        for cell, view in enumerate(mine):
            likeness = np.array([view @ other for other in others]) / ssl.TEMPERATURE
            losses.append(np.log(np.exp(likeness).sum()) - likeness[cell])
    assert ssl.info_nce(*map(torch.from_numpy, (first, second))).item() == pytest.approx(np.mean(losses), rel=1e-6)


def test_views_of_a_cell_share_no_gene_and_find_each_other_among_real_cells():
    cells = real.all_of_kang()
    counts = sp.csr_matrix(cells.X)[np.random.default_rng(0).permutation(cells.n_obs)[:5000]].astype(np.float32)
    values = {"n_genes": 1000, "n_hidden": [128], "n_latent": 64, "batch_size": 128, "learning_rate": 0.003}
    model, views = models.create("ssl_contrastive", **values), []
    model.fit(counts[:4500], None, steps=300, seed=0)
    model.module.encoder.register_forward_hook(lambda _, given, out: views.append((given[0], out)) or None)
    share_of_chance = model.heldout_loss(counts[4500:], None)
    first, second = (
        set(zip(np.repeat(range(500), np.diff(view.offsets)), view.genes.tolist(), strict=True)) for view, _ in views
    )
    assert len(first) + len(second) == model.prepare(counts[4500:]).nnz
    assert not first & second
    mine, others = (torch.nn.functional.normalize(embedding) for _, embedding in views)
    found = ((mine @ others.T).argmax(1) == torch.arange(500)).float().mean().item()
    assert found > 10 / 500
    assert 0 < share_of_chance < 0.85
    nats = ssl.info_nce(*(embedding for _, embedding in views)).item()
    assert share_of_chance == pytest.approx(nats / np.log(500), rel=1e-4)  # of a guess among the cells


# Depth and quality


def test_thinned_counts_are_binomial_and_the_same_for_a_seed():
    counts = sp.random(300, 400, 0.2, format="csr", random_state=0, data_rvs=lambda n: np.arange(1, n + 1) % 20 + 1.0)
    thinned = sampling.thin(counts, 0.1, np.random.default_rng(0))
    total = counts.sum()
    assert abs(thinned.sum() - 0.1 * total) < 3 * np.sqrt(total * 0.1 * 0.9)
    of_cells = (thinned.sum(1) - 0.1 * counts.sum(1)) / np.sqrt(0.09 * counts.sum(1))
    assert stats.kstest(np.ravel(of_cells), "norm").pvalue > 0.001
    assert (thinned > counts).nnz == 0
    assert thinned.data.min() >= 1
    again, rng = sampling.thin(counts, 0.1, np.random.default_rng(0)), np.random.default_rng(0)
    assert (again != thinned).nnz == 0
    in_blocks = sp.vstack([sampling.thin(counts[some : some + 70], 0.1, rng) for some in range(0, 300, 70)])
    assert (in_blocks != thinned).nnz == 0


def test_richest_and_poorest_cells_are_drawn_from_their_halves():
    n_genes = np.random.default_rng(0).permutation(1000)
    rich, poor = (choose(n_genes, 20, seed=1) for choose in (sampling.of_richest, sampling.of_poorest))
    assert len(rich) == len(poor) == 200
    assert n_genes[rich].min() >= 500 > n_genes[poor].max()
    assert len(sampling.of_richest(n_genes, 50, seed=1)) == 500
    with pytest.raises(ValueError, match="percentage 51 is more than the half"):
        sampling.of_richest(n_genes, 51, seed=1)
    study = {"study": "x", "strategies": ["richest"], "percentages": [75], "seeds": [0], "models": ["SSL"], "steps": 1}
    with pytest.raises(params.ParamsError, match="percentages: richest draws at most 50 %; leave 75 out"):
        params.check(study, "x.yaml")


# Runs of a study


LABELS = "2x", "decay", "other", "deep", "long"


def test_levers_say_what_was_varied_in_each_run(tmp_path):
    study = small_study(
        tmp_path,
        percentages=[50, 100],
        models=["SSL"],
        steps=4,
        hyperparameters={
            "SSL": {"n_genes": 200, "n_hidden": [16], "n_latent": 8, "batch_size": 32},
            "SSL@2x": {"n_hidden": [32], "n_latent": 16, "learning_rate": 0.01},
            "SSL@decay": {"weight_decay": 0.5},
            "SSL@other": {"dropout": 0.5, "n_hidden": [32]},
            "SSL@deep": {"n_hidden": [16, 16]},
        },
        steps_by_model={"SSL@long": 8},
        also=[
            {"name": "models", "models": [f"SSL@{label}" for label in LABELS], "percentages": [100]},
            {"name": "strategies", "strategies": ["depth_10", "richest", "untrained"], "percentages": [50]},
        ],
        budget_check={"percentages": [100], "seeds": [0], "budgets": [0.5, 2]},
    )
    study.pretrain()
    evaluation.evaluate(study, "zeroshot_classification")
    whole = questions.levers(study)
    table = whole[whole["metric"] == "micro_f1"].set_index(["label", "strategy", "cells", "steps"]).sort_index()
    shown = table[["varied", "depth", "width", "samples"]].apply(tuple, axis=1).to_dict()
    assert shown == {
        ("SSL", "depth_10", 0.5, 1.0): ("depth", 0.1, 1.0, 128),
        ("SSL", "random", 0.5, 1.0): ("", 1.0, 1.0, 128),
        ("SSL", "random", 1.0, 0.5): ("", 1.0, 1.0, 64),
        ("SSL", "random", 1.0, 1.0): ("", 1.0, 1.0, 128),
        ("SSL", "random", 1.0, 2.0): ("", 1.0, 1.0, 256),
        ("SSL", "richest", 0.5, 1.0): ("strategy", 1.0, 1.0, 128),
        ("SSL@2x", "random", 1.0, 1.0): ("width", 1.0, 2.0, 128),
        ("SSL@decay", "random", 1.0, 1.0): ("weight_decay", 1.0, 1.0, 128),
        ("SSL@other", "random", 1.0, 1.0): ("several", 1.0, 2.0, 128),
        ("SSL@deep", "random", 1.0, 1.0): ("several", 1.0, 1.0, 128),
        ("SSL@long", "random", 1.0, 2.0): ("", 1.0, 1.0, 256),
    }
    assert set(table["model"]) == set(table["family"]) == {"SSL"}
    rows = results.read_results(study.folder)
    given = rows[rows["percentage"] == 50].assign(model="given")  # an embedding made elsewhere, on a subset
    results.write_tables({"results": pd.concat([rows, given])}, study.folder, {})
    pd.testing.assert_frame_equal(questions.levers(study), whole)
    results.write_tables({"results": given, "budgets": given.iloc[:0]}, study.folder, {})
    assert walls.sentences(questions.levers(study)) == []
    random, thinned = (
        study.cells(run.subset) for run in study.pretraining_runs()[:1] + study.pretraining_runs()[-3:-2]
    )
    assert thinned.counts().sum() == pytest.approx(0.1 * random.counts().sum(), rel=0.05)
    assert list(thinned.names()) == list(random.names())
    pd.testing.assert_frame_equal(thinned.obs, random.obs)


# Surface, repeats, verdict


def noiseless(wall="data"):
    runs, true = planted(wall, np.random.default_rng(0), spread=0.0)
    return walls.points(walls.means(runs[runs["model"] == "SSL"], "micro_f1")).assign(se=0.01), true


def test_a_surface_without_noise_is_found_and_foretells_the_largest_size():
    points, true = noiseless()
    fitted = walls.surface(points, n_draws=3)
    assert fitted.predict(points) == pytest.approx(points["error"].to_numpy(), rel=1e-3)
    for lever in walls.LEVERS:
        twice = pd.DataFrame({name: [1.0, 2.0 if name == lever else 1.0] for name in walls.LEVERS})
        assert fitted.doubling(lever)[0] == pytest.approx(-np.diff(fitted.predict(twice))[0], abs=1e-12)
        assert fitted.doubling(lever)[0] == pytest.approx(true.doubling(lever)[0], abs=2e-4)
    assert fitted.cells_as_half_the_depth()[0] == pytest.approx(true.cells_as_half_the_depth()[0], abs=0.01)
    largest = walls.held_out(points)
    assert largest["foretold"].to_numpy() == pytest.approx(largest["error"].to_numpy(), rel=0.01)


def test_a_lever_that_was_not_varied_has_no_part_in_the_surface():
    points, _ = noiseless()
    fitted = walls.surface(points[(points["width"] == 1) & (points["depth"] == 1)], n_draws=2)
    assert fitted.names == ("floor", "of cells", "cells", "of steps", "steps")
    assert not fitted.doubling("width").any()


def test_what_repeated_cells_are_worth_is_found_without_noise():
    points, planted_r = repeated(np.random.default_rng(3), spread=1e-6)
    step = walls.REPEATS[1] / walls.REPEATS[0]
    assert planted_r / step < walls.repeats_worth(points, n_draws=1)[0] < planted_r * step


@pytest.mark.parametrize("wall", ["data", "budget", "objective", "quality", walls.LABELS])
def test_a_planted_wall_is_named(wall):
    assert named(wall, 0, n_draws=40) == wall


def test_worth_and_verdict_are_of_the_draws():
    draws = {"data": [0.010, 0.011, 0.009], "budget": [0.001, 0.002, 0.000]}
    table = pd.DataFrame(draws).rename_axis("draw").melt(var_name="suspect", value_name="gain", ignore_index=False)
    table = table.reset_index().assign(task="t", dataset="d", model="m", error=0.07)
    worth = walls.worth(table).set_index("suspect")
    assert worth.loc["data", ["gain", "low", "high"]].tolist() == pytest.approx([10, 9.05, 10.95])
    assert walls.verdicts(table)["wall"].tolist() == ["data"]
    assert walls.verdicts(table, margin=0.012)["wall"].tolist() == [walls.LABELS]  # none may gain as much
    assert walls.verdicts(table, label_error=0.08)["wall"].tolist() == [walls.LABELS]
    unsure = table.assign(gain=table["gain"].where(table["suspect"] == "budget", [0.01, -0.001, 0.02, 0, 0, 0]))
    assert walls.verdicts(unsure)["wall"].tolist() == [walls.OPEN]


def test_swaps_are_differences_at_the_largest_size_that_both_have():
    table = design()
    table["value"] = 0.9 + 0.02 * (table["strategy"] == "richest") * (table["cells"] == 0.1)
    table["value"] += 0.01 * (table["model"] == "ssl_contrastive") * (table["cells"] == 1)
    twice = table[table["model"] == "SSL"]  # again under another label, and as a variant of another width
    table = pd.concat([table, twice.assign(label="SSL@again"), twice.assign(model="scvi_2x", value=1, family="SSL")])
    found = walls.worth(walls.gains(table, "micro_f1", n_draws=2)).set_index(["model", "suspect"])["gain"]
    assert 0 < found["SSL", "quality"] <= 20  # which fades from a tenth of the cells to all
    assert found["SSL", "diversity"] == pytest.approx(0)
    assert found["SSL", "objective"] == pytest.approx(10)
    assert "objective" not in walls.gains(table.assign(metric="explained"), "explained", n_draws=2)["suspect"].unique()


def test_reliability_is_the_stepped_up_correlation_of_halves():
    rng = np.random.default_rng(0)
    own, noise = rng.normal(size=400), rng.normal(size=(2, 400))
    rows = {"task": "t", "dataset": "d", "metric": "m", "model": "x", "strategy": "random", "percentage": 10.0}
    tables = [pd.DataFrame(rows | {"seed": range(400), "split": str(i), "value": own + noise[i]}) for i in range(2)]
    assert walls.reliability(pd.concat(tables), "m")["t", "d"] == pytest.approx(2 / 3, abs=0.05)


def test_a_study_that_varies_too_little_has_no_wall():
    too_few = design().assign(value=0.9)[:9]
    assert walls.sentences(too_few, "micro_f1") == []
    worth = walls.worth(walls.gains(too_few, "micro_f1"))
    unvaried = curves.variants(pd.DataFrame(columns=results.COLUMNS), "micro_f1")
    assert {figure.get_suptitle()[:15] for figure in (maps.suspects(worth, 0.005), unvaried)} == {"Nothing to show"}
