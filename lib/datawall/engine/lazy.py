"""Names of a package that load when first named, so that importing the package costs nothing."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attach(package: str, places: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package, by its `__name__` and where each public name is.

    That is `module` for a module itself, `module:name` for something in it. Other modules of the package load when
    named too, but are not listed.
    """

    def load(name: str) -> Any:
        module, _, inner = places.get(name, f"{package}.{name}").partition(":")
        try:
            loaded = import_module(module)
        except ModuleNotFoundError as error:
            if error.name != f"{package}.{name}":  # something that the module needs
                raise
            raise AttributeError(f"module {package!r} has no attribute {name!r}") from None
        return getattr(loaded, inner) if inner else loaded

    return load, lambda: sorted(places)
