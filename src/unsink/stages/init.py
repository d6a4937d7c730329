"""`unsink init`: a working project folder, without a clone of the repository."""

from pathlib import Path
from typing import Any

from unsink import artifacts, project
from unsink.errors import ParamsError

_WITHOUT_GIT = ".dvc/config.local"


def run(folder: Path, template: str) -> dict[str, Any]:
    """Write the project's files; return the folder, the template and their names. All of them, or none.

    Raises:
        ParamsError: no such template, or the folder holds some of these files.
        DataError: the folder cannot be written.
    """
    texts = project.files(template)
    if not _in_git(folder):
        # In a file of its own, that git will ignore: who puts the project under git later has this one line to remove.
        texts[_WITHOUT_GIT] = "[core]\n    no_scm = true\n"
    _refuse(folder, texts)
    written: list[Path] = []
    try:
        for name, text in texts.items():
            artifacts.write_text(folder / name, text)
            written.append(folder / name)
    except BaseException:  # a key pressed, too: all of them, or none
        for path in written:
            path.unlink()
        raise
    return {"folder": str(folder), "template": template, "files": sorted(texts)}


def report(result: dict[str, Any]) -> str:
    """What was made, and what to type next."""
    made = f"{result['folder']}: a project with the params of the template {result['template']}"
    return f"{made}\nnext: cd {result['folder']}; unsink check; dvc repro; unsink show"


def _refuse(folder: Path, names: dict[str, str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise ParamsError(f"{folder} is a file", "name a new folder, or an empty one")
    if there := sorted(name for name in names if (folder / name).exists()):
        raise ParamsError(
            f"{folder} already holds {', '.join(there)}; nothing was written", "name a new folder, or an empty one"
        )


def _in_git(folder: Path) -> bool:
    place = folder.absolute()
    return any((parent / ".git").exists() for parent in (place, *place.parents))
