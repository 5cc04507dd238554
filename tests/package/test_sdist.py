"""The sdist holds all that builds and tests it, and its page on an index has links that lead somewhere."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest

import cpattn

ROOT = Path(__file__).parents[2]
# As a release names it.
REPOSITORY = "https://forge.example/someone/cpattn"
# Of use to those who have the repository alone.
NOT_SHIPPED = re.compile(r"\.github/|\.gitignore$")


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a checkout: only git knows what there should be")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name for name in listed if name and (ROOT / name).exists()}


@pytest.fixture(scope="module")
def copy(tracked: set[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout called cpattn to build in: setuptools writes beside what it reads."""
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("build") / "cpattn"
    for name in tracked:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    return copy


def build(copy: Path, kind: str) -> Path:
    program = f"from setuptools import build_meta; build_meta.build_{kind}('dist_{kind}')"
    environment = {**os.environ, "REPOSITORY": REPOSITORY}
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = (copy / f"dist_{kind}").iterdir()
    return archive


@pytest.fixture(scope="module")
def shipped(copy: Path) -> dict[str, str]:
    """The text of each file of an sdist; "" for those that are none."""
    archive = build(copy, "sdist")
    with tarfile.open(archive) as files:
        found = {member.name.partition("/")[2]: files.extractfile(member) for member in files if member.isfile()}
        return {name: file.read().decode(errors="ignore") if file else "" for name, file in found.items()}


def test_the_sdist_holds_all_that_git_has(tracked: set[str], shipped: dict[str, str]) -> None:
    made = {name for name in shipped if name == "PKG-INFO" or name.startswith("cpattn.egg-info/")}
    assert set(shipped) - made == {name for name in tracked if not NOT_SHIPPED.match(name)}


def test_a_program_beside_a_checkout_imports_what_is_installed_from_it(copy: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(copy, "editable")) as wheel:
        wheel.extractall(tmp_path)
    program = f"import site; site.addsitedir({str(tmp_path)!r}); import importlib.util; print(importlib.util.find_spec('cpattn').origin)"
    # What runs the tests may have a path to the package as well.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], cwd=copy.parent, env=environment, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).name == "__init__.py"


def test_links_of_an_index_page_name_files_of_this_version(tracked: set[str], shipped: dict[str, str]) -> None:
    about = HeaderParser().parsestr(shipped["PKG-INFO"])
    addresses = dict(line.split(", ", 1) for line in about.get_all("Project-URL", []))
    assert addresses["Repository"] == REPOSITORY
    assert all(address.startswith(REPOSITORY) for address in addresses.values())
    page = about.get_payload()
    assert isinstance(page, str)
    readme = (ROOT / "README.md").read_text()
    within = [link for link in re.findall(r"\]\(([^)\s]+)\)", readme) if not link.startswith(("https://", "#"))]
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert all(link.startswith(("https://", "#")) for link in links)
    own = [link for link in links if link.startswith(f"{REPOSITORY}/")]
    assert [re.sub(r".*?/(blob|raw)/[^/]*/", "", link) for link in own] == within
    assert {link.removeprefix(f"{REPOSITORY}/").split("/")[1] for link in own} == {f"v{cpattn.__version__}"}
    assert {Path(link).suffix for link in own if "/raw/" in link} <= {".svg", ".png"}
    assert about["Description-Content-Type"] == "text/markdown"


def test_without_an_address_nothing_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    said: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **metadata: said.update(metadata))
    monkeypatch.delenv("REPOSITORY", raising=False)
    runpy.run_path(str(ROOT / "setup.py"))
    assert said["project_urls"] == {}
    page = said["long_description"]
    assert all(link.startswith(("https://", "#")) for link in re.findall(r"\]\(([^)\s]+)\)", page))
    assert "![" not in page
    assert "([how to choose]" in (ROOT / "README.md").read_text()
    assert "(how to choose)" in page
