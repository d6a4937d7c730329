"""Plug-ins by folder scan: one file in a package is one plug-in, named like the file.

Python names have no hyphens and names in params.yaml no underscores: the file `muse_books.py` is the plug-in
`muse-books`. A file that starts with an underscore is shared by plug-ins and is none itself.
"""

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterable
from types import ModuleType

from unsink.errors import ParamsError


def names(package: str) -> list[str]:
    """Names of the plug-ins in a package, sorted, without importing any of them."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    files = (m.name for m in pkgutil.iter_modules(folders or []))
    return sorted(name.replace("_", "-") for name in files if not name.startswith("_"))


def load(kind: str, package: str, name: str) -> ModuleType:
    """Import one plug-in.

    Args:
        kind: What the plug-in is, for the error text ("method", "benchmark").
        package: Dotted name of the package that holds the plug-ins.
        name: Name of the plug-in: that of its file without the ending, hyphens for underscores.

    Raises:
        ParamsError: There is no such plug-in.
    """
    known = names(package)
    if name not in known:
        raise ParamsError(unknown(kind, name, known))
    return importlib.import_module(f"{package}.{name.replace('-', '_')}")


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """The sentence for a name that nothing answers to."""
    known = list(known)
    return f"unknown {kind} '{name}'{suggest(name, known)} (available: {', '.join(known) or 'none'})"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest known name, or "" when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
