"""docs/serving.md speaks of what there is; test_docs.py runs its code, as that of every page."""

from __future__ import annotations

import re
from pathlib import Path

import cpattn

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def test_names_that_the_page_speaks_of_exist() -> None:
    for name in re.findall(r"cpattn\.([A-Za-z_]+)", PAGE.replace("cpattn.testing", "")):
        assert hasattr(cpattn, name), name
    for name in re.findall(r"`([A-Za-z]+Error)`", PAGE):
        assert issubclass(getattr(cpattn, name), cpattn.CPError)
    for name in re.findall(r"`(all_gather|ring|pass_\w+)`", PAGE):
        assert name in cpattn.STRATEGIES
