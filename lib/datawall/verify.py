"""What a run folder holds: whether it is as it was written, what made it, and what would be made again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datawall import results, store
from datawall.store import MANIFEST, Record


def problems(folder: Path) -> list[str]:
    """All that is damaged in a run folder, a line each; every file of every artifact is read and hashed again."""
    found = []
    for manifest in sorted(_artifacts(folder)):
        artifact = manifest.parent
        wrong = store.damage(artifact)
        if not wrong:
            made = store.read_manifest(artifact)
            if (artifact.parent.name, artifact.name) != (made["kind"], made["key"]):
                wrong = [f"it is {made['kind']} {made['key']}, in the place of another"]
            elif store.key_of(made["kind"], made["record"], made["code"]) != made["key"]:
                wrong = ["its key is not that of its record"]
        found += [f"{artifact.relative_to(folder)}: {what}" for what in wrong]
    return found + results.damage(folder)


def count(folder: Path) -> int:
    """Artifacts of a run folder."""
    return sum(1 for _ in _artifacts(folder))


def _artifacts(folder: Path) -> Iterator[Path]:
    """Where the manifests are, or would be."""
    return (path / MANIFEST for path in (folder / "store").glob("*/[!.]*") if path.is_dir())


def why(folder: Path, key: str) -> str:
    """What made an artifact, what has changed since, and what else would be made again with it; in words.

    Parameters
    ----------
    folder
        The run folder.
    key
        Its key, such as a `run_id` of the results, or how that begins.

    Raises
    ------
    ValueError
        If no artifact has that key, or more than one.
    """
    made = {path.parent.name: _sound(path.parent) for path in _artifacts(folder)}
    matching = sorted(name for name in made if name.startswith(key))
    if len(matching) != 1:
        raise ValueError(
            f"--why {key}: {len(matching) or 'no'} artifacts of {folder} have a key that begins so; give one of the "
            "folder names under store/, or a run_id of the results."
        )
    key = matching[0]
    if made[key] is None:
        return f"{key} is damaged ({'; '.join(store.damage(_place(folder, key)))}), and will be made again."
    sound = {name: manifest for name, manifest in made.items() if manifest}
    return "\n".join([*_origin(sound, key), *_fate(sound, key)])


def _sound(artifact: Path) -> Record | None:
    try:
        return store.read_manifest(artifact)
    except (OSError, ValueError):
        return None


def _place(folder: Path, key: str) -> Path:
    return next((folder / "store").glob(f"*/{key}"))


def _origin(made: dict[str, Record], key: str) -> list[str]:
    """Who made an artifact, and from what."""
    manifest = made[key]
    of, versions = manifest["made"], manifest["made"]["versions"]
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [
        f"{manifest['kind']} {key}",
        f"made    {of['ended']} on {of['host']} ({of['device']}), {of['seconds']:g} s, {of['peak_memory_mib']} MiB",
        f"with    {packages}",
        f"files   {', '.join(manifest['files'])}",
        "from",
        *_tree(made, key, "  "),
    ]


def _tree(made: dict[str, Record], key: str, indent: str) -> Iterator[str]:
    """The record of an artifact and, below it, those of what it was made from."""
    for name, value in made[key]["record"].items():
        if isinstance(value, str) and value in made:
            yield f"{indent}{name}: {made[value]['kind']} {value}"
            yield from _tree(made, value, indent + "  ")
        else:
            yield f"{indent}{name}: {value}"


def _fate(made: dict[str, Record], key: str) -> list[str]:
    """What has changed since, and what depends on an artifact."""
    stale = {name: ", ".join(changed) for name in _with_inputs(made, key) if (changed := _changed(made[name]))}
    dependent = Counter(
        manifest["kind"] for name, manifest in made.items() if name != key and key in _with_inputs(made, name)
    )
    lines = [f"  the code of {modules}, which made {made[name]['kind']} {name}" for name, modules in stale.items()]
    if stale:
        begin = ["changed since, so that a run makes it again, under another key:", *lines]
    else:
        begin = ["A run that asks for it finds it: the code that made it, and what it was made from, is the same."]
    if not dependent:
        return [*begin, "Nothing was made from it."]
    return [*begin, f"Made from it: {', '.join(f'{n} {kind}' for kind, n in sorted(dependent.items()))}."]


def _changed(manifest: Record) -> list[str]:
    """Modules whose code is no longer what made an artifact."""
    code = manifest["code"].items()
    return [module for module, before in code if module not in store.SOURCES or store.code_version(module) != before]


def _with_inputs(made: dict[str, Record], key: str) -> set[str]:
    """Keys of an artifact and of all that it was made from."""
    found, open_ = set(), [key]
    while open_:
        found.add(name := open_.pop())
        open_ += [each for each in _strings(made[name]["record"]) if each in made and each not in found]
    return found


def _strings(value: Any) -> Iterator[str]:
    """All texts among JSON values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
