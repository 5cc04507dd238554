"""The code in docs/serving.md does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import cpattn

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()


def test_every_block_runs_as_printed() -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) >= 8
    for number, code in enumerate(blocks):
        exec(compile(code, f"docs/serving.md, block {number}", "exec"), names)


def test_names_that_the_page_speaks_of_exist() -> None:
    for name in re.findall(r"cpattn\.([A-Za-z_]+)", PAGE.replace("cpattn.testing", "")):
        assert hasattr(cpattn, name), name
    for name in re.findall(r"`([A-Za-z]+Error)`", PAGE):
        assert issubclass(getattr(cpattn, name), cpattn.CPError)
    for name in re.findall(r"`(all_gather|ring|pass_\w+)`", PAGE):
        assert name in cpattn.STRATEGIES
