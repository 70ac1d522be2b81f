"""What a run folder holds: whether it is as it was written, what made it, and what would be made again."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datawall.analysis import results
from datawall.engine import code, store
from datawall.engine.store import Artifact


def problems(folder: Path) -> list[str]:
    """All that is damaged in a run folder, by every file's hash, or missing though results have it: a line each."""
    places = artifacts(folder)
    wrong = {place.relative_to(folder): store.check(place)[1] for place in places.values()}
    damaged = [f"{place}: {what}" for place, said in wrong.items() for what in said]
    if tables := results.damage(folder):
        return damaged + tables
    named = results.read_results(folder)["run_id"] if (folder / "results.parquet").is_file() else ()
    lost = sorted(set(named).difference(places))
    return damaged + [f"store/evaluation/{key}: is missing, and results.csv has numbers of it" for key in lost]


def absent(folder: Path) -> list[str]:
    """What others were made from and is not there, a line each: no damage, as what was made from it is whole."""
    places, needed = artifacts(folder), {}
    for made in store.read_all(folder / "store").values():
        for name, given in made.record.items():
            for key in store.texts(given):  # of a split, `drop` is a list
                if re.fullmatch("[0-9a-f]{16}", key) and key not in places:
                    needed.setdefault((name, key), []).append(made)
    return [
        f"not here: {name} {key}, from which {_counted(made)} {'was' if len(made) == 1 else 'were'} made; a run makes "
        "it again if it needs it"
        for (name, key), made in needed.items()
    ]


def artifacts(folder: Path) -> dict[str, Path]:
    """Where the artifacts of a run folder are, damaged ones too, by key."""
    return {path.name: path for path in sorted((folder / "store").glob("*/[!.]*")) if path.is_dir()}


def why(folder: Path, key: str) -> str:
    """What made an artifact of a run folder, what has changed since, and what else would be made again with it.

    The key, such as a `run_id` of the results, may be shortened. Raises ValueError if not exactly one artifact has it.
    """
    places = artifacts(folder)
    matching = [name for name in places if name.startswith(key)]
    if len(matching) != 1:
        told = f"{len(matching) or 'no'} artifacts of {folder} have a key that begins so"
        raise ValueError(f"--why {key}: {told}; give one of the folder names under store/, or a run_id of the results.")
    (key,) = matching
    if wrong := store.check(places[key])[1]:
        return f"{key} is damaged ({'; '.join(wrong)}), and will be made again."
    there = store.read_all(folder / "store")
    artifact, how = there[key], there[key].made
    cost = f"{how['seconds']:g} s, process's peak memory {how['peak_memory_mib']} MiB"
    lines = [
        f"{artifact.kind} {key}",
        f"made    {how['ended']} on {how['host']} ({how['device']}), {cost}",
        f"with    {', '.join(f'{name} {version}' for name, version in how['versions'].items())}",
        f"files   {', '.join(artifact.files)}",
        "from",
        *_tree(artifact, there, "  "),
    ]
    if changed := list(_changes([artifact, *store.upstream([artifact], there)])):
        lines += ["changed since, so that a run makes it again, under another key:", *changed]
    else:
        lines += ["A run that asks for it finds it: the code that made it, and what it was made from, is the same."]
    dependent = [other for other in there.values() if artifact in store.upstream([other], there)]
    return "\n".join([*lines, f"Made from it: {_counted(dependent)}." if dependent else "Nothing was made from it."])


def _tree(artifact: Artifact, there: dict[str, Artifact], indent: str) -> Iterator[str]:
    """The record of an artifact and, below it, those of what it was made from."""
    for name, value in artifact.record.items():
        sources = [there[text] for text in store.texts(value) if text in there]
        for source in sources:
            yield f"{indent}{name}: {source.kind} {source.key}"
            yield from _tree(source, there, indent + "  ")
        if not sources:
            yield f"{indent}{name}: {value}"


def _changes(artifacts: list[Artifact]) -> Iterator[str]:
    """Which code of those that made artifacts is no longer what it was, a line for each."""
    for made in artifacts:
        now = {name: code.code_version(name) for name in made.code if name.partition(":")[0] in code.SOURCES}
        if changed := [name for name, before in made.code.items() if now.get(name) != before]:
            yield f"  the code of {', '.join(changed)}, which made {made.kind} {made.key}"


def _counted(made: list[Artifact]) -> str:
    """How many artifacts of which kinds, in words."""
    return ", ".join(f"{n} {kind}" for kind, n in sorted(Counter(artifact.kind for artifact in made).items()))
