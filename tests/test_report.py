"""The report of a run: complete, right, safe, offline, and good to use in a browser."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import result_tables

from datawall import tasks
from datawall.analysis import results, verdicts
from datawall.engine import disk, paths, store
from datawall.engine.store import Store, Unit
from datawall.reading import plots, report
from datawall.study import params
from datawall.study.study import open_study

EVIL = "<script>window.pwned = 1</script> T & B"  # a cell type's name
SIZES = (1.0, 10.0, 100.0)
WHERE = ("zeroshot_classification", "cells_held_out")  # task and data set of all results
STUDY = """
study: small
corpus: cells.h5ad
strategies: [random, celltype_reweighted]
percentages: [1, 10, 100]
seeds: [0, 1]
models: [PretrainedPCA, SSL]
steps: 20
tasks: [zeroshot_classification, finetuned_classification]
"""


def score(model, percentage, seed):
    """A made-up score: PretrainedPCA is flat, SSL rises, and seeds differ by 0.01."""
    return 0.9 + 0.01 * seed if model == "PretrainedPCA" else 0.5 + 0.1 * SIZES.index(percentage) + 0.01 * seed


TRAINING = {"machine": "NVIDIA H100", "gpus": 2, "seconds": 2.0, "cells": 1000, "tokens": 0, "operations": 9.89e14}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder as a study leaves it, its numbers made up, a cell type's name full of markup."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    folder.mkdir()
    (folder / "study.yaml").write_text(STUDY)
    made = Store(folder / "store")
    rows = []

    def add(kind, record, how=None, **content):
        def make(scratch):
            disk.write_json(scratch / "content.json", content)
            return how

        return made.find_or_make(Unit(kind, record, ()), make).key

    corpus = add("corpus", {"corpus": ["cells.h5ad"], "columns": {"cell_type": EVIL}})
    split = add("split", {"corpus": corpus, "held_out": 0.3})
    for name, percentage, seed in [(m, p, s) for m in ("PretrainedPCA", "SSL") for p in SIZES for s in (0, 1)]:
        subset = add("subset", {"strategy": "random", "percentage": percentage, "seed": seed, "split": split})
        how = {"training": TRAINING} if name == "SSL" else None
        model = add("model", {"model": name, "hyperparameters": {"n_latent": 8}, "seed": seed, "subset": subset}, how)
        key = add("evaluation", {"task": "zeroshot_classification", "dataset": split, "model": model})
        of = ["small", name, "random", percentage, seed, int(percentage * 10), *WHERE]
        value = score(name, percentage, seed)
        rows += [[*of, "micro_f1", value - 0.001, "cells 0", key], [*of, "micro_f1", value + 0.001, "cells 1", key]]
        rows += [[*of, "macro_f1", value / 2, f"{EVIL} held out", key]]
    for name, value in {"PCA": 0.8, "HVG": 0.3}.items():
        key = add("evaluation", {"task": "zeroshot_classification", "baseline": name, "dataset": split})
        # Rows of chance carry a baseline's `run_id`.
        for model, level in ([("Chance", 0.1)] if name == "HVG" else []) + [(name, value)]:
            of = ["small", model, "baseline", 0.0, -1, 0, *WHERE]
            rows += [[*of, "micro_f1", level, f"cells {split}", key] for split in (0, 1)]
    table = pd.DataFrame(rows, columns=results.COLUMNS)
    intervals = table.assign(low=table["value"] - 0.01, high=table["value"] + 0.01, chance=0.1, ceiling=np.nan)
    parameters = open_study(str(folder)).params.model_dump(mode="json")
    results.write_tables({"results": table, "intervals": intervals.drop(columns="run_id")}, folder, parameters)
    write_figures(folder / "figures")
    write_notebooks(folder / "notebooks")
    report.write(folder)
    return folder


def write_figures(folder):
    for name in ("learning_curves_zeroshot_classification", "saturation_points"):
        figure, axis = plt.subplots()
        axis.plot([1, 10, 100], [0.5, 0.6, 0.7])
        plots.save(figure, name, pd.DataFrame({"percentage": [1, 10, 100]}), folder)
        plt.close(figure)


def write_notebooks(folder):
    folder.mkdir()
    new = nbformat.v4
    table = pd.DataFrame({"cells": [3, 4]}, index=pd.Index([EVIL, "B cell"], name="cell type"))
    wide = pd.DataFrame(np.zeros((2, 40)), columns=[f"a long name {i}" for i in range(40)])
    bold = f"<b>bold</b> {EVIL}<img src='data:,' onerror='window.pwned = 2'>"
    outputs = [
        new.new_output("stream", text=f"{EVIL} and \x1b[31mred\x1b[0m\n"),
        new.new_output("execute_result", {"text/html": table.to_html(), "text/plain": str(table)}),
        new.new_output("display_data", {"text/html": bold}),
        new.new_output("display_data", {"text/html": wide.to_html(), "text/plain": str(wide)}),
    ]
    failing = new.new_output("error", ename="ValueError", evalue=f"no {EVIL}", traceback=["Traceback", "ValueError"])
    first = "# 1 · Cells: *which* ones\n\nWhat there is, see [2](02_second.ipynb#Verdict).\n\n## More"
    code = "table  # a comment\nfor x in 'text', 1.5: print(x)"
    for name, prose, source, printed in (
        ("01_first", first, code, outputs),
        ("02_second", "# 2 · Models\n\nWhat they learn.\n\n## Verdict", "1 / 0", [failing]),
    ):
        cells = [new.new_markdown_cell(prose), new.new_code_cell(source, outputs=printed, execution_count=1)]
        notebook = new.new_notebook(cells=cells, metadata={"papermill": {"duration": 12.5}})
        nbformat.write(notebook, folder / f"{name}.ipynb")


class Page(HTMLParser):
    """Links, ids and tags of a page, and the text that it shows."""

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.tags, self.text = [], set(), [], []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        self.ids.add(given.get("id"))
        self.links += [given[name] for name in ("href", "src") if name in given]

    def handle_data(self, data):
        self.text.append(data)


def pages(run):
    return {path.relative_to(run / "report").as_posix(): Page(path) for path in (run / "report").rglob("*.html")}


def test_every_link_leads_to_a_page_or_file_of_the_report(run):
    every = pages(run)
    n_followed = 0
    for name, page in every.items():
        for link in page.links:
            if link.startswith(("data:", "https://")):
                continue
            path, _, anchor = link.partition("#")
            target = ((run / "report" / name).parent / path).resolve() if path else run / "report" / name
            assert target.is_relative_to(run / "report"), f"{name}: {link}"
            assert target.is_file(), f"{name}: {link}"
            if anchor:
                assert anchor in every[target.relative_to(run / "report").as_posix()].ids, f"{name}: {link}"
            n_followed += 1
    assert n_followed > 10 * len(every)


def test_nothing_is_fetched_from_elsewhere_and_pages_are_light(run):
    for name, page in pages(run).items():
        for tag, attributes in page.tags:
            fetched = attributes.get("src") or (attributes.get("href") if tag == "link" else "") or ""
            assert not re.match(r"(https?:)?//", fetched), f"{name}: {fetched}"
    for path in (run / "report").rglob("*.*"):
        assert path.stat().st_size < 5_000_000
    assert "url(" not in (run / "report" / "style.css").read_text()


def test_markup_in_names_is_shown_and_never_becomes_markup(run):
    shown = 0
    for name, page in pages(run).items():
        scripts = [attributes for tag, attributes in page.tags if tag == "script"]
        assert [list(each) for each in scripts] == [["src", "defer"]], name
        assert not [attributes for _, attributes in page.tags if any(key.startswith("on") for key in attributes)], name
        shown += EVIL in "".join(page.text)
    assert shown >= 3  # a table of a notebook, the splits of an evaluation, the columns of the corpus


def test_every_number_is_one_click_from_what_it_was_made_from(run):
    table = Page(run / "report" / "results_zeroshot_classification.html")
    ids = results.read_results(run)["run_id"].unique()
    assert {f"artifacts/{key[:2]}.html#{key}" for key in ids} <= set(table.links)
    artifacts = store.read_all(run / "store")
    for key in ids:
        page = Page(run / "report" / "artifacts" / f"{key[:2]}.html")
        text = "".join(page.text)
        assert key in page.ids
        assert "Chance, " not in text
        manifest = json.loads((run / "store" / "evaluation" / key / "manifest.json").read_text())
        assert manifest["files"]["content.json"] in text
        assert manifest["made"]["versions"]["numpy"] in text
        behind = {one.key for one in store.upstream([artifacts[key]], artifacts)}
        assert {f"../artifacts/{one[:2]}.html#{one}" for one in behind} <= set(page.links)


def test_upstream_follows_records_to_the_corpus(run):
    artifacts = store.read_all(run / "store")
    one = next(one for one in artifacts.values() if one.kind == "evaluation" and "model" in one.record)
    assert [each.kind for each in store.upstream([one], artifacts)] == ["split", "model", "corpus", "subset"]
    assert store.upstream([next(one for one in artifacts.values() if one.kind == "corpus")], artifacts) == []


def test_costs_add_up_to_the_manifests_and_the_disk(run):
    artifacts = store.read_all(run / "store").values()
    table = report.costs(artifacts).set_index("made")
    manifests = [json.loads(path.read_text()) for path in run.glob("store/*/*/manifest.json")]
    assert table["artifacts"].sum() == len(manifests) == 1 + 1 + 6 + 12 + 14
    assert table["time, all"].sum() == pytest.approx(sum(each["made"]["seconds"] for each in manifests))
    n_bytes = sum(path.stat().st_size for path in run.glob("store/*/*/*"))
    assert table["disk (MB)"].sum() == pytest.approx(n_bytes / 1e6)
    assert table.loc["model: SSL", "artifacts"] == 6
    (speed,) = report.speeds(artifacts).itertuples(index=False, name=None)
    assert speed == ("SSL", "NVIDIA H100", 2, "cells", 500, pytest.approx(989e3 / 6), pytest.approx(494_500), "25%")
    assert table["process's peak memory (MiB)"].max() == max(each["made"]["peak_memory_mib"] for each in manifests)


def test_damaged_manifest_is_left_out(run, tmp_path):
    folder = tmp_path / "store" / "corpus" / "0123456789abcdef"
    folder.mkdir(parents=True)
    for damage in ("", "[]", '{"key": "0123456789abcdef"}'):
        (folder / "manifest.json").write_text(damage)
        assert store.read_all(tmp_path / "store") == {}


def test_verdicts_are_those_of_the_numbers(run):
    found = verdicts.table(results.read_results(run, "intervals"))
    by_model = found.set_index("model")
    assert by_model.loc["PretrainedPCA", "value"] == pytest.approx(0.905)
    assert by_model.loc["SSL", ["value", "size"]].tolist() == pytest.approx([0.705, 100])
    assert by_model["percentage"].to_dict() == {"PretrainedPCA": 1, "SSL": 100}
    assert by_model["baseline"].unique().tolist() == ["PCA"]
    assert by_model["difference"].tolist() == pytest.approx([0.105, -0.095])
    assert by_model["against"].to_dict() == {"PretrainedPCA": "above", "SSL": "below"}
    said = " ".join(verdicts.sentences(found))
    assert "By the published rule, 1 of 2 curves, one for each model and data set, are saturated at" in said
    assert "2 of 2 curves" in " ".join(verdicts.sentences(found.assign(percentage=10)))
    assert said.startswith("verdicts: 0 plateau, 1 still improving, 0 budget-limited, 1 undecided, of 2")
    assert "1 of 2 are above the best baseline, 0 level with it and 1 below." in said
    unsure = " ".join(verdicts.sentences(found.assign(against="not told from")))
    assert "0 of 2 are above the best baseline, 0 level with it and 0 below; 2 cannot be told from it." in unsure
    text = "".join(Page(run / "report" / "index.html").text)
    assert all(number in text for number in ("0.905", "0.705", "0.800", "above PCA", "below PCA"))


def test_verdicts_turn_round_where_lower_is_better(monkeypatch):
    monkeypatch.setitem(tasks.HEADLINE, "reconstruction", "loss")
    scores = {1: [3.0, 3.01], 10: [2.0, 2.01], 100: [2.2, 2.21]}
    losses = result_tables.table(*result_tables.curve(scores, task="reconstruction", metric="loss", n_cells=10))
    (found,) = verdicts.table(losses.assign(**dict.fromkeys(results.KNOWN, np.nan))).to_dict("records")
    assert (found["size"], found["value"], found["percentage"]) == (10, pytest.approx(2.005), 10)
    assert found["baseline"] is None


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def test_results_of_other_parameters_are_not_told_as_those_of_the_study_file(copy):
    (copy / "study.yaml").write_text(STUDY.replace("steps: 20", "steps: 30") + "workers: 1\n")
    (said,) = report.Site(open_study(str(copy))).sentences
    assert said.startswith("The results are not those of study.yaml as it is now: they are of other steps. ")
    (copy / "study.yaml").write_text(STUDY + "workers: 1\n")
    assert len(report.Site(open_study(str(copy))).sentences) == 4


def test_a_metric_that_is_a_number_nowhere_has_a_column(copy):
    tables = {path.stem: results.read_results(copy, path.stem) for path in copy.glob("*.parquet")}
    tables["results"]["value"] = tables["results"]["value"].where(tables["results"]["metric"] != "micro_f1")
    results.write_tables(tables, copy, results.parameters(copy))
    assert dict(report.Site(open_study(str(copy))).pages())


def test_clusters_in_place_of_cell_types_are_told(copy):
    for settings, told in (("", False), ("cell_type_key: leiden\n", True)):
        (copy / "study.yaml").write_text(STUDY + settings)
        name, page = next(report.Site(open_study(str(copy))).pages())
        assert name == "index.html"
        assert ("which favours PretrainedPCA" in page) == told


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("results.parquet", lambda path: path.write_bytes(b""), "results.parquet is missing, or not as it was written"),
        ("results.json", lambda path: path.write_text("{}"), "results.json is missing, or not as it was written"),
        ("results.sha256", lambda path: path.unlink(), "results.sha256 is missing"),
    ],
)
def test_damaged_results_are_refused_in_one_line_with_the_remedy(name, harm, said, copy):
    harm(copy / name)
    with pytest.raises(ValueError, match=f"^{copy}: {said}; run the study again"):
        report.write(copy)
    if name == "results.sha256":
        ended = subprocess.run([sys.executable, "-m", "datawall.reading.report", copy], capture_output=True, text=True)
        assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
        assert said in ended.stderr


def test_changes_are_what_a_study_has_otherwise():
    default = params.read(paths.study_file("quick"))
    assert report.changes(default, default.model_copy(update={"study": "other"})) == []
    other = params.read(paths.study_file("quick"), {"seeds": [0], "hyperparameters": {"SSL": {"n_latent": 8}}})
    changed = {key: (before, after) for key, before, after in report.changes(default, other)}
    assert changed["seeds"] == ("0, 1, 2, 3, 4", "0")
    assert changed["hyperparameters.SSL.n_latent"] == ("64", "8")
    assert changed["hyperparameters.scVI.n_hidden"] == ("128", "none")
    assert "steps" not in changed


def test_report_of_a_run_without_results_has_what_there_is(tmp_path):
    (tmp_path / "study.yaml").write_text(STUDY)
    text = report.write(tmp_path).read_text()
    assert "No task has been evaluated" in text
    assert report.write(tmp_path).read_text() == text
    with pytest.raises(FileNotFoundError, match="no such study"):
        report.write(tmp_path / "nothing")


def test_report_replaces_an_earlier_one_and_leaves_nothing_else(run):
    (run / "report" / "stale.html").write_text("old")
    before = {path.name for path in run.iterdir()}
    assert report.write(run) == run / "report" / "index.html"
    assert not (run / "report" / "stale.html").exists()
    assert {path.name for path in run.iterdir()} == before


# In a browser


@pytest.fixture
def opened(run, chromium):
    """Opens a page of the report at a width, and fails on whatever the console or the network says."""
    contexts, said = [], []

    def open_page(name, width=1440):
        context = chromium.new_context(viewport={"width": width, "height": 900})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{name}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"{name}: {error}"))
        page.on("requestfailed", lambda request: said.append(f"{name}: {request.url} failed"))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        page.goto((run / "report" / name).as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


KINDS_OF_PAGE = ["index.html", "results_zeroshot_classification.html", "figures.html", "provenance.html"]
KINDS_OF_PAGE += ["notebooks/01_first.html", "notebooks/02_second.html", "artifact"]


@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("name", KINDS_OF_PAGE)
def test_page_is_accessible_and_fits_the_screen(name, width, run, opened):
    from axe_playwright_python.sync_playwright import Axe

    if name == "artifact":
        name = f"artifacts/{results.read_results(run)['run_id'].iloc[0][:2]}.html"
    page = opened(name, width)
    found = Axe().run(page, options={"preload": False, "resultTypes": ["violations"]}).response["violations"]
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.pwned") is None


def test_tables_sort_and_filter(opened):
    page = opened("results_zeroshot_classification.html")

    def column(number):
        return page.locator(f"tbody tr:not([hidden]) td:nth-child({number})").all_inner_texts()

    values = column(7)
    page.get_by_role("button", name="micro-F1").click()
    assert column(7) == sorted(values, key=float)
    page.get_by_role("button", name="micro-F1").press("Enter")
    assert column(7) == sorted(values, key=float, reverse=True)
    assert page.locator("[aria-sort=descending]").count() == 1
    page.get_by_role("button", name="cells").click()
    assert column(5) == sorted(column(5), key=lambda text: int(text.replace(",", "")))
    page.get_by_label("Filter").fill("ssl 1,000")
    assert column(1) == ["SSL", "SSL"]
    assert page.get_by_role("status").inner_text() == "2 rows"
    page.get_by_label("Filter").fill("")
    assert len(column(1)) == len(values)


def test_keyboard_reaches_the_content_tables_and_links(opened):
    page = opened("notebooks/01_first.html", 390)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#content"
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.className || document.activeElement.tagName"))
    assert "output_area" in reached  # the wide table, which scrolls
    assert "next" in reached  # the way to the next notebook


def test_a_reader_clicks_from_the_verdict_to_the_corpus(opened):
    page = opened("index.html")
    page.get_by_role("link", name="zero-shot classification").first.click()
    page.locator("tbody a").first.click()
    page.locator("section:target").get_by_role("row", name="corpus").get_by_role("link").click()
    assert page.locator("section:target h2").inner_text().startswith("corpus")
    assert EVIL in page.locator("main").inner_text()


def test_page_reads_without_scripts(run, chromium):
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((run / "report" / "results_zeroshot_classification.html").as_uri())
    assert page.locator("tbody tr").count() == 15
    context.close()
