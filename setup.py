"""What pyproject.toml cannot say: the addresses on an index's page. All else of the package's metadata stands there."""

import os
import re
import runpy
from pathlib import Path

from setuptools import setup

# The repository's address, which a release names: make dist REPOSITORY=https://... No address is better than a wrong one.
REPOSITORY = os.environ.get("REPOSITORY", "").rstrip("/")

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "cpattn" / "version.py"))["__version__"]


def for_an_index(page: str) -> str:
    """A page as an index shows it, which has no files beside it: links within the repository name the files of this version there.

    Without an address nothing is linked that would lead nowhere: of such a link its words stay, and of a picture nothing.
    """

    def link(found: re.Match[str]) -> str:
        picture, words, path = found.groups()
        if REPOSITORY:
            return f"{picture}[{words}]({REPOSITORY}/{'raw' if picture else 'blob'}/v{VERSION}/{path})"
        return "" if picture else words

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#|mailto:)([^)\s]+)\)", link, page)


setup(
    long_description=for_an_index((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    project_urls={
        "Repository": REPOSITORY,
        "Documentation": f"{REPOSITORY}/tree/v{VERSION}/docs",
        "Changelog": f"{REPOSITORY}/blob/v{VERSION}/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    }
    if REPOSITORY
    else {},
)
