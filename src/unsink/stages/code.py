"""`unsink code`: hash the installed code of each stage into `code.json`, so that an upgrade reruns what it changed.

Projects that `unsink init` made run it as the first stage of `dvc repro`.
"""

from unsink import artifacts, project
from unsink.artifacts import Layout


def run(layout: Layout) -> dict[str, str]:
    """Write `code.json` and return it: stage -> SHA-256 of its code."""
    hashes = project.code()
    artifacts.write_json(layout.root / project.CODE, hashes)
    return hashes
