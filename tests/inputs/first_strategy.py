"""The strategy of docs/your_first_strategy.md, as the page has it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn.exchange.strategy import Strategy
from inputs.cases import AttentionCase

PAGE = Path(__file__).parents[2] / "docs" / "your_first_strategy.md"


@cache
def ulysses() -> Strategy:
    """Made of the page's first block."""
    code = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)[0]
    assert len(code.splitlines()) < 100
    names: dict[str, Any] = {"__name__": "__docs__"}
    exec(compile(code, PAGE.name, "exec"), names)
    strategy = names["ULYSSES"]
    assert isinstance(strategy, Strategy)
    return strategy


def attend(case: AttentionCase, plan: cpattn.Plan, backend: str) -> tuple[Tensor, Tensor]:
    """What a process runs."""
    return case.on_rank(plan, dist.get_rank(), None, ulysses(), backend)
