"""Reads the package's source by `ast`: which module imports which."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "unsink"


def modules() -> dict[str, Path]:
    """Dotted name -> file, for every module of the package."""
    return {_dotted(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports anywhere, also inside functions."""
    known = modules()
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from unsink import models` names a module, `from unsink.models import load_base` a function
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & set(known)


def closure(module: str) -> set[str]:
    """A module and everything of the package that it imports, directly or not.

    `unsink/__init__.py` ends the search: it imports by name what a user asks it for, and no module of the package does.
    """
    known, found, queue = modules(), {"unsink"}, [module]
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += imports(known[name])
    return found


def stage_deps(stage: str) -> set[str]:
    """Source files and plug-in folders that can change what a stage writes, as DVC wants to see them."""
    found = closure(f"unsink.stages.{stage}") - {"unsink"}
    folders = {folder for name in found for folder in loaded_folders(name)}
    files = {modules()[name].relative_to(ROOT).as_posix() for name in found}
    return {file for file in files if not any(file.startswith(f"{folder}/") for folder in folders)} | folders


def loaded_folders(module: str) -> set[str]:
    """Plug-in folders from which a module loads files by a name that is known at run time only."""
    if module == "unsink.params":
        return set()  # it looks at names and options to check them, which changes no output
    text = modules()[module].read_text()
    mentions = {
        "methods": ("METHODS", '"unsink.methods"'),
        "benchmarks": ("BENCHMARKS", '"unsink.benchmarks"'),
        "report": ('files("unsink.report")',),  # template, style and script
    }
    return {f"src/unsink/{folder}" for folder, words in mentions.items() if any(word in text for word in words)}


def _dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
