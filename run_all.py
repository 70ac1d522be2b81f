"""Run a study: check its file, show the plan, execute the notebooks in order with papermill.

python run_all.py                                  the default study, params/quick.yaml
python run_all.py params/tiny.yaml --plan          what it would do
python run_all.py --set seeds=[0,1,2] --from 2     other parameters, from the second stage on
python run_all.py --new mine --corpus cells.h5ad   a study file for cells of one's own, proposed from a look at them
python run_all.py --check params/mine.yaml         what it would do with the data, and what would stop it
"""

from __future__ import annotations

import argparse
import locale
import logging
import math
import os
import sys
import threading
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

STAGES = {
    1: "01_curation",
    2: "02_pretraining",
    3: "03_zero_shot_classification",
    4: "04_zero_shot_integration",
    5: "05_fine_tuned_classification",
    6: "06_perturbation_response",
    7: "07_figures",
}
BETWEEN_WRITES = 5.0  # seconds, of a notebook that is executed
TASKS = {
    3: "zeroshot_classification",
    4: "zeroshot_integration",
    5: "finetuned_classification",
    6: "perturbation_response",
}
# What a stage makes, by its name in a plan, where no stage before it has.
MAKES = {number: ["pretraining", task] for number, task in TASKS.items()}
MAKES |= {2: ["pretraining", "reconstruction", "zeroshot_classification"]}
MAKES |= {5: [*MAKES[3], *MAKES[5]], 7: ["pretraining", "reconstruction", *TASKS.values()]}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a stage failed, 2 the request is wrong, 130 interrupted."""
    options = _options(arguments)
    only_looks = options.new or options.check or options.plan or options.calibrate or options.verify or options.why
    try:
        stages = _stages(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        from datawall.engine import forkserver

        # Before all else, as it has much to import, which takes as long as what comes before the first stage. Layouts,
        # in stage 4 alone, take umap, which compiles for seconds.
        with nullcontext() if only_looks else forkserver.server(["umap"] if 4 in stages else []):
            return _follow(options, stages)
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept; the same command goes on from there.", file=sys.stderr)
        return 130


def _follow(options: argparse.Namespace, stages: list[int]) -> int:
    """Do what the options say; returns the exit status."""
    # dask and jsonschema ask for these, and do without; they load numba, or a grammar, for a second and more.
    for unneeded in ("sparse", "rfc3987_syntax"):
        sys.modules.setdefault(unneeded, None)
    from datawall.engine import disk, paths
    from datawall.planning import plan as planning
    from datawall.reading import last_run, verify
    from datawall.study import params
    from datawall.study.study import Study

    try:
        if options.new:
            return _new(options)
        path = paths.study_file(options.study)
        if options.check:
            return _check(path, _overrides(options.set))
        parameters = params.read(path, _overrides(options.set))
        folder = Path(options.out).resolve() if options.out else paths.run_folder(path, parameters.study)
        study = Study(parameters, folder)
        if options.verify or options.why:
            return _look_into(folder, options.why)
        if options.calibrate:
            from datawall.planning import calibration

            path = calibration.calibrate(parameters)
            print(planning.speeds(study.costs), f"written: {path}; --plan now counts with it", sep="\n")
            return 0
        work = f"{parameters.study}: " + "\n  ".join(planning.counts_in_words(study))
        if options.plan:
            print(work, planning.table(study), sep="\n")
            return 0
        disk.check_run_folder(study.folder)
        left, otherwise = ({}, {}) if parameters.census else planning.seconds_left(study)
    except (OSError, RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    about = f"; about {planning.duration(sum(left.values()))} of computing" if any(left.values()) else ""
    print(work, f"into {_shown(study.folder)}{about}", sep="\n")
    for differ, n in otherwise.items():
        print(f"of other versions: {n} models and evaluations, used as they are: made before {differ}.")
        print("To make all of them anew, give a new folder with --out.")
    try:
        with disk.reserve(study.folder):
            # Only a network could tell what the Census has.
            by_itself = not (left or options.stages or options.first or parameters.census)
            if by_itself and (said := last_run.said(study, map(_notebook, STAGES))):
                same = "study, notebooks, code and packages are those of the last run"
                print(f"{same}; what it left is checked …", flush=True)
                if not verify.problems(study.folder):
                    print("nothing to do: all is as it was written; --from 1 executes the notebooks again.")
                    print(*said, sep="\n")
                    return 0
            return _run(study, stages, left)
    except BlockingIOError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        where = "" if error.filename else f"{study.folder}: "
        remedy = "What is finished is kept; the same command goes on once this is mended."
        print(f"\n{where}{error}. {remedy}", file=sys.stderr)
        return 1


def _look_into(folder: Path, key: str | None) -> int:
    """Say where an artifact of a run folder comes from or, without a key, what in the folder is damaged."""
    from datawall.engine import disk
    from datawall.reading import verify

    if not disk.is_run_folder(folder):
        raise FileNotFoundError(f"{folder}: no folder of a run (no study.yaml, no artifacts in store/); see --out.")
    if key:
        print(verify.why(folder, key))
        return 0
    problems = verify.problems(folder)
    print("\n".join(problems) or f"{folder}: {len(verify.artifacts(folder))} artifacts, all as they were written")
    print(*(f"{line}\n" for line in verify.absent(folder)), sep="", end="")
    if problems:
        print("The same command without --verify makes again what is damaged and needed.", file=sys.stderr)
    return 1 if problems else 0


def _run(study: Any, stages: list[int], left: dict[str, float]) -> int:
    """Execute the notebooks of stages in turn, then write the report; returns the command's exit status."""
    from datawall.reading import last_run

    of_all = stages == list(STAGES)  # of some stages nothing is recorded
    begun_with = last_run.surroundings(study, map(_notebook, STAGES)) if of_all else None
    study.write_params()
    _write_notebooks_whole()
    threading.Thread(target=import_module, args=("datawall.reading.report",), daemon=True).start()  # ready at the end
    left_out = [number for number in stages if number in TASKS and TASKS[number] not in study.params.tasks]
    for number in left_out:
        print(f"{_stage(number)}: left out, {TASKS[number]} is not among the study's tasks")
    failed = None
    for number in [number for number in stages if number not in left_out]:
        not_judged = study.not_judged(TASKS[number]) if number in TASKS else {}
        for dataset, why in not_judged.items():
            print(f"{_stage(number)}: left out for {dataset}: {why}")
        if not_judged and not study.joined(TASKS[number]):
            continue
        if not _run_stage(number, study, left):
            failed = STAGES[number]
            break
    try:
        said = _conclusions(study, failed)
    except ValueError as error:  # of damaged results
        print(f"no report: {error}", file=sys.stderr)
        return 1
    print(*said, sep="\n")
    if begun_with and not failed:
        last_run.write(study, begun_with, said)
    return 1 if failed else 0


def _conclusions(study: Any, failed: str | None) -> list[str]:
    """Write the report; returns, a line each, where it is, what failed or else what the study found."""
    from datawall.reading import report

    site = report.Site(study)
    where = f"report: {_shown(site.write())}"
    if failed:
        return [where, f"failed: {failed}"]
    found = [f"numbers: {_shown(study.folder / 'results.csv')}", *site.sentences] if len(site.intervals) else []
    return [where, *found, "nothing failed"]


def _new(options: argparse.Namespace) -> int:
    """Write a study file for cells of the user's own; asks on a terminal, takes what it proposes elsewhere."""
    from datawall.planning import starter

    if not options.corpus:
        raise ValueError("--new needs --corpus: the path of an .h5ad or .zarr file with raw counts, or several.")

    def ask(question: str, proposed: str) -> str:
        return input(f"{question} [{proposed}]: ").strip() or proposed

    given = {role: getattr(options, role) for role in starter.QUESTIONS}
    asked = ask if sys.stdin.isatty() else None
    path = _shown(starter.new(options.new, options.corpus, given, _overrides(options.set), asked, print))
    print(f"written: {path}; look into it, then: python run_all.py --check {path}")
    return 0


def _check(path: Path, overrides: dict[str, Any]) -> int:
    """Say what a study would do with its data, and what would stop it."""
    from datawall.planning import preflight

    report = preflight.check(path, overrides)
    for line in [*report.facts, *(f"warning: {line}" for line in report.warnings)]:
        print(line)
    for line in report.errors:
        print(f"error: {line}", file=sys.stderr)
    print(f"mistakes that would stop it: {len(report.errors) or 'none'}")
    return 2 if report.errors else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="Stages: " + ", ".join(STAGES.values()) + "."
    )
    parser.add_argument(
        "study", nargs="?", default="params/quick.yaml", help="study file, or the name of one in params/"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stages", metavar="3,5", help="only these stages")
    which.add_argument("--from", dest="first", metavar="4", help="this stage and those after it")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value of the study file (YAML); repeatable",
    )
    parser.add_argument("--out", metavar="DIR", help="run folder; runs/<study> by default")
    look = parser.add_mutually_exclusive_group()
    look.add_argument("--verify", action="store_true", help="hash all of the run folder, and name what is damaged")
    look.add_argument("--why", metavar="KEY", help="tell what made an artifact, and what would be made again with it")
    parser.add_argument("--plan", action="store_true", help="show what would be done and what it would cost, and stop")
    parser.add_argument("--calibrate", action="store_true", help="measure for --plan what units cost on this machine")
    parser.add_argument("--check", action="store_true", help="open the data, say what would be done, and stop")
    new = parser.add_argument_group("a study of your own")
    new.add_argument("--new", metavar="NAME", help="write params/NAME.yaml after a look into the corpus, and stop")
    new.add_argument("--corpus", nargs="+", metavar="PATH", help=".h5ad or .zarr files with raw counts")
    columns = {"label": "cell_type", "batch": "batch", "donor": "donor", "perturbation": "perturbation"}
    for option, role in columns.items():
        new.add_argument(f"--{option}", dest=role, metavar="COLUMN", help="a column of obs, or none")
    new.add_argument("--control", metavar="VALUE", help="of the perturbation that means untreated")
    return parser.parse_args(arguments)


def _stages(options: argparse.Namespace) -> list[int]:
    """Numbers of the stages asked for, in order."""
    given = options.stages or options.first
    if given is None:
        return list(STAGES)
    numbers = [int(part) if part.strip().isdigit() else part for part in given.split(",")]
    if options.first and len(numbers) > 1:
        raise ValueError(f"--from {given}: give one stage, from which all are run; --stages {given} runs these alone.")
    if wrong := [number for number in numbers if number not in STAGES]:
        raise ValueError(
            f"stage {wrong[0]!r}: no such stage; they are 1 to {len(STAGES)}, as in --stages 3,5 or --from 4."
        )
    return [n for n in STAGES if n >= numbers[0]] if options.first else sorted(set(numbers))


def _notebook(number: int) -> Path:
    """The notebook of a stage."""
    from datawall.engine import paths

    return paths.repository() / "notebooks" / f"{STAGES[number]}.ipynb"


def _overrides(given: list[str]) -> dict[str, Any]:
    """Values of `--set key=value`, read as YAML."""
    from datawall.study import params

    overrides = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: write it as key=value, say --set steps=100.")
        try:
            overrides[key] = params.from_yaml(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {text}: {value!r} is not readable as YAML; write lists as [1, 10].") from None
    return overrides


def _write_notebooks_whole() -> None:
    """Let papermill write a notebook as all else is written, all of it or nothing, and every few seconds.

    It writes before and after each cell, a tenth of the time of a run that finds everything made. The last cells are
    written when the notebook ends or fails.
    """
    # jsonschema asks for it, and does without: it takes a second to build grammars of addresses, which no notebook has.
    sys.modules.setdefault("rfc3987_syntax", None)
    from papermill.engines import NotebookExecutionManager
    from papermill.iorw import LocalHandler, papermill_io

    from datawall.engine import disk

    class Whole(LocalHandler):
        def write(self, text: str, path: str) -> None:
            disk.write_text(Path(path), text)

    papermill_io.register("/", Whole())  # of absolute paths
    save, written = NotebookExecutionManager.save, {}

    def save_seldom(manager: Any) -> None:
        if time.monotonic() - written.get(manager.output_path, -math.inf) >= BETWEEN_WRITES:
            save(manager)
            written[manager.output_path] = time.monotonic()

    NotebookExecutionManager.save = save_seldom


def _run_stage(number: int, study: Any, left: dict[str, float]) -> bool:
    """Execute one notebook into the run folder, in a kernel of its own; says whether it succeeded."""
    import papermill

    from datawall.engine import kernels
    from datawall.planning import plan as planning

    source = _notebook(number)
    executed = study.folder / "notebooks" / source.name
    values = {**study.params.model_dump(), "study": _shown(study.folder)}
    declared = papermill.inspect_notebook(str(source))
    begin = time.perf_counter()
    made = [*left] if number == 2 and study.params.adaptive else MAKES.get(number, ())  # what it chooses, it judges
    seconds = sum(left.pop(name, 0) for name in made)
    line = f"{_stage(number)} …" + (f" about {planning.duration(seconds)}" if seconds else "")
    print(line, end="" if sys.stdout.isatty() else "\n", flush=True)
    with kernels.forked() as kernel:
        try:
            papermill.execute_notebook(
                str(source),
                str(executed),
                {key: values[key] for key in declared},
                progress_bar=False,
                # The kernel's own progress bars, for a person who is watching.
                log_output=sys.stderr.isatty(),
                stderr_file=sys.stderr if sys.stderr.isatty() else None,
                km=kernel,
                # Imports on a busy machine are slow; a kernel that has died is noticed at once.
                start_timeout=600,
                coalesce_streams=True,  # of a progress bar, keep what is left of it in the end
            )
        except papermill.PapermillExecutionError as error:
            print(f"\n{source.stem} failed: {error.ename}: {error.evalue}", file=sys.stderr)
            print(f"The notebook as far as it ran: {_shown(executed)}", file=sys.stderr)
            return False
        except KeyboardInterrupt:
            logging.disable()  # of what nbclient and asyncio have to say when their kernel is taken from them
            raise
        except RuntimeError as error:  # nbclient's, of a kernel that was killed or never started
            print(kernel.printed.read_text(encoding="utf-8") if kernel else "", end="", file=sys.stderr)
            print(f"\n{source.stem} failed: {error}; perhaps memory ran out.", file=sys.stderr)
            print("What is finished is kept; the same command goes on.", file=sys.stderr)
            return False
    done = f"{_stage(number)} done in {time.perf_counter() - begin:.0f} s"
    print(f"\r{done:<{len(line)}}" if sys.stdout.isatty() else done, flush=True)
    return True


def _stage(number: int) -> str:
    """How a stage begins its lines."""
    return f"[{number}/{len(STAGES)}] {STAGES[number]}"


def _shown(path: Path) -> str:
    """A path as a reader wants it: relative to the repository where it lies within."""
    from datawall.engine import paths

    repository = paths.repository()
    return str(path.relative_to(repository)) if path.is_relative_to(repository) else str(path)


def _use_utf8() -> None:
    """Begin again in Python's UTF-8 mode where the locale has another encoding; what it cannot show is replaced."""
    if not sys.flags.utf8_mode and locale.getencoding().lower() not in ("utf-8", "utf8"):
        os.environ |= {"PYTHONUTF8": "1", "PYTHONIOENCODING": f"{sys.stdout.encoding}:replace"}
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606


if __name__ == "__main__":
    _use_utf8()
    sys.exit(main())
