"""Files of a git revision, as a folder."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from unsink.errors import DataError, MissingPrerequisite
from unsink.registry import suggest


def export(root: Path, revision: str, folders: Sequence[str], into: Path) -> None:
    """Write what a revision holds of some folders into another place; a folder that it lacks is left out.

    Only what git itself keeps is there: of a file that DVC keeps, git has nothing but its hash in dvc.lock.

    Args:
        root: the project folder, the repository's root or any folder in it.
        revision: whatever git calls a commit.
        folders: relative to `root`.
        into: an empty folder.

    Raises:
        MissingPrerequisite: git is not installed, or `root` lies in no repository.
        DataError: there is no such revision.
    """
    if _git(root, "rev-parse", "--git-dir") is None:
        raise MissingPrerequisite(f"'{revision}' is no file or folder, and no revision: the project is not in git")
    commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        refs = (_git(root, "for-each-ref", "--format=%(refname:short)") or b"").decode(errors="replace").split()
        raise DataError(
            f"'{revision}' is no file, no folder and no git revision{suggest(revision, refs)}",
            "a shallow clone has no other branches: fetch the revision first",
        )
    name = commit.decode().strip()
    for path in (_git(root, "ls-tree", "-r", "-z", "--name-only", name, "--", *folders) or b"").split(b"\0"):
        if path:
            place = into / path.decode()
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(_git(root, "show", f"{name}:./{path.decode()}") or b"")


def _git(root: Path, *arguments: str) -> bytes | None:
    """What git prints; None where it fails."""
    try:
        result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    except FileNotFoundError as error:
        raise MissingPrerequisite("git is not installed, so no revision can be read") from error
    return result.stdout if result.returncode == 0 else None
