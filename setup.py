"""What pyproject.toml cannot say: the addresses on an index's page. All else of the package's metadata stands there."""

import re
import runpy
from pathlib import Path

from setuptools import setup

# The repository's address, in this one place: change it here, and every link of a package follows.
REPOSITORY = "https://github.com/OWNER/cpattn"

ROOT = Path(__file__).resolve().parent
VERSION = runpy.run_path(str(ROOT / "cpattn" / "version.py"))["__version__"]


def for_an_index(page: str) -> str:
    """A page whose links within the repository name the files of this version there, as an index has no files beside it."""
    link = re.compile(r"(!?)(\[[^\]]*\])\((?!https?://|#|mailto:)([^)\s]+)\)")
    return link.sub(lambda found: f"{found[1]}{found[2]}({REPOSITORY}/{'raw' if found[1] else 'blob'}/v{VERSION}/{found[3]})", page)


setup(
    long_description=for_an_index((ROOT / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    project_urls={
        "Repository": REPOSITORY,
        "Documentation": f"{REPOSITORY}/tree/v{VERSION}/docs",
        "Changelog": f"{REPOSITORY}/blob/v{VERSION}/CHANGELOG.md",
        "Issues": f"{REPOSITORY}/issues",
    },
)
