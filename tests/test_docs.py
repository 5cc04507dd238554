"""The README's code, and the examples, do what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cpattn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_readme_code_runs(code: str) -> None:
    names: dict[str, object] = {}
    exec(code, names)
    assert names["everything"].shape == (134, 8, 64)  # type: ignore[attr-defined]


def test_readme_picture_is_the_plan_of_the_example() -> None:
    requests = json.loads((ROOT / "examples" / "batches" / "mixed.json").read_text())
    plan = cpattn.plan([(request["prefix_len"], request["extend_len"]) for request in requests], cp_size=4)
    assert plan.draw() in README
    assert ", ".join(map(str, plan.rank_tokens)) in README
    assert f"{plan.pair_imbalance:.4f}" in README


def test_readme_tables_name_all_that_there_is() -> None:
    for name in [*cpattn.BACKENDS, *cpattn.STRATEGIES]:
        assert f"`{name}`" in README


def test_quickstart_checks_itself() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "examples/quickstart.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("relative RMSE") == 3


def test_quickstart_says_how_to_start_it() -> None:
    done = subprocess.run([sys.executable, "examples/quickstart.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "start this with: torchrun --nproc-per-node 4 examples/quickstart.py"
