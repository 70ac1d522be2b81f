"""Run a study: check its file, show the plan, execute the notebooks in order with papermill.

python run_all.py                                  the default study, params/quick.yaml
python run_all.py params/tiny.yaml --plan          what it would do
python run_all.py --set seeds=[0,1,2] --from 2     other parameters, from the second stage on
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import ExitStack
from itertools import zip_longest
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
TASKS = {
    3: "zeroshot_classification",
    4: "zeroshot_integration",
    5: "finetuned_classification",
    6: "perturbation_response",
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 a stage failed, 2 the request is wrong, 130 interrupted."""
    options = _options(arguments)
    from datawall import evaluation, params, paths, store
    from datawall.study import Study

    try:
        stages = _stages(options)
        path = paths.study_file(options.study)
        parameters = params.read(path, _overrides(options.set))
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    study = Study(parameters, Path(options.out).resolve() if options.out else paths.run_folder(path, parameters.study))
    if options.verify or options.why:
        return _look_into(study.folder, options.why)
    plan = ", ".join(f"{count} {what}" for what, count in evaluation.plan(study).items())
    print(f"{parameters.study}: {plan}; into {_shown(study.folder, paths.repository())}")
    if options.plan:
        return 0
    try:
        with store.reserved(study.folder):
            return _run(study, stages)
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept; the same command goes on from there.", file=sys.stderr)
        return 130
    except BlockingIOError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"\n{error}. What is finished is kept; the same command goes on once this is mended.", file=sys.stderr)
        return 1


def _look_into(folder: Path, key: str | None) -> int:
    """Say where an artifact of a run folder comes from or, without a key, what in the folder is damaged."""
    from datawall import verify

    if key:
        try:
            print(verify.why(folder, key))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    problems = verify.problems(folder)
    print("\n".join(problems) or f"{folder}: {verify.count(folder)} artifacts, all as they were written")
    if problems:
        print("The same command without --verify makes again what is damaged and needed.", file=sys.stderr)
    return 1 if problems else 0


def _run(study: Any, stages: list[int]) -> int:
    """Execute the notebooks of stages in turn; returns the command's exit status."""
    from datawall import paths

    parameters = study.params
    study.write_params()
    for number in stages:
        if number in TASKS and TASKS[number] not in parameters.tasks:
            name = STAGES[number]
            print(f"[{number}/{len(STAGES)}] {name}: left out, {TASKS[number]} is not among the study's tasks")
    stages = [number for number in stages if number not in TASKS or TASKS[number] in parameters.tasks]
    with ExitStack() as kernels:
        following = _start_kernel(kernels)
        for number, later in zip_longest(stages, stages[1:]):
            # The next stage's kernel starts meanwhile: start-up is a third of what a small study takes.
            kernel, following = following, _start_kernel(kernels) if later else None
            if not _run_stage(number, study, paths.repository(), kernel):
                return 1
            kernel.shutdown_kernel(now=True)
    print(f"results: {_shown(study.folder / 'results.csv', paths.repository())}")
    print(f"figures: {_shown(paths.figures_folder(study.folder), paths.repository())}")
    print(f"executed notebooks: {_shown(study.folder / 'notebooks', paths.repository())}")
    return 0


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
    parser.add_argument("--plan", action="store_true", help="show what would be done, and stop")
    return parser.parse_args(arguments)


def _stages(options: argparse.Namespace) -> list[int]:
    """Numbers of the stages asked for, in order."""
    given = options.stages or options.first
    if given is None:
        return list(STAGES)
    numbers = [int(part) if part.strip().isdigit() else part for part in given.split(",")]
    if wrong := [number for number in numbers if number not in STAGES]:
        raise ValueError(
            f"stage {wrong[0]!r}: no such stage; they are 1 to {len(STAGES)}, as in --stages 3,5 or --from 4."
        )
    return [n for n in STAGES if n >= numbers[0]] if options.first else sorted(set(numbers))


def _overrides(given: list[str]) -> dict[str, Any]:
    """Values of `--set key=value`, read as YAML."""
    overrides = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: write it as key=value, say --set steps=100.")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {text}: {value!r} is not readable as YAML; write lists as [1, 10].") from None
    return overrides


def _start_kernel(exits: ExitStack) -> Any:
    """A Jupyter kernel that begins by importing what every notebook will; it ends with `exits`."""
    from jupyter_client import KernelManager

    class Kernel(KernelManager):
        def client(self, **options: Any) -> Any:
            """A client that is closed with the kernel: papermill leaves that of a kernel it is given open."""
            client = super().client(**options)
            exits.callback(client.stop_channels)
            return client

    # Unix sockets: no ports to race for when several runs start at once, nothing readable from outside.
    sockets = exits.enter_context(tempfile.TemporaryDirectory(prefix="datawall-"))
    kernel = Kernel(
        kernel_name="python3",
        transport="ipc",
        ip=f"{sockets}/kernel",
        # papermill waits for messages and watches over the kernel at once; the default client cannot.
        client_class="jupyter_client.asynchronous.AsyncKernelClient",
    )
    imports = [f"__import__('datawall.{module}')" for module in ("evaluation", "models", "plots")]
    kernel.start_kernel(extra_arguments=[f"--IPKernelApp.exec_lines={imports}"])
    exits.callback(kernel.shutdown_kernel, now=True)
    return kernel


def _run_stage(number: int, study: Any, repository: Path, kernel: Any) -> bool:
    """Execute one notebook into the run folder, in a kernel of its own; says whether it succeeded."""
    import papermill

    name = STAGES[number]
    source = repository / "notebooks" / f"{name}.ipynb"
    executed = study.folder / "notebooks" / f"{name}.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    values = {**study.params.model_dump(), "study": _shown(study.folder, repository)}
    declared = papermill.inspect_notebook(str(source))
    begin = time.perf_counter()
    print(f"[{number}/{len(STAGES)}] {name} …", end="" if sys.stdout.isatty() else "\n", flush=True)
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
        )
    except papermill.PapermillExecutionError as error:
        print(f"\n{name} failed: {error.ename}: {error.evalue}", file=sys.stderr)
        print(f"The notebook as far as it ran: {_shown(executed, repository)}", file=sys.stderr)
        return False
    except RuntimeError as error:  # nbclient's, of a kernel that was killed or never started
        print(
            f"\n{name} failed: {error}; perhaps memory ran out. What is finished is kept; the same command goes on.",
            file=sys.stderr,
        )
        return False
    print(f"\r[{number}/{len(STAGES)}] {name} done in {time.perf_counter() - begin:.0f} s", flush=True)
    return True


def _shown(path: Path, repository: Path) -> str:
    """A path as a reader wants it: relative to the repository where it lies within."""
    return str(path.relative_to(repository)) if path.is_relative_to(repository) else str(path)


if __name__ == "__main__":
    sys.exit(main())
