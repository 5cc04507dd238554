"""Groups of KV heads that are brought and attended to one after another, with the query heads that belong to them."""

from __future__ import annotations

from typing import NamedTuple

from cpattn.exchange.attend import Attend
from cpattn.keys import Keys
from cpattn.problem import Problem
from cpattn.spans import Spans


class HeadGroup(NamedTuple):
    """Some KV heads, and their query heads; None for all, which spares the slicing."""

    kv_heads: slice | None
    q_heads: slice | None


def head_groups(problem: Problem) -> list[HeadGroup]:
    """As many as ``overlap`` says."""
    if problem.overlap == 1:
        return [HeadGroup(None, None)]
    kv, q = problem.kv_heads // problem.overlap, problem.q_heads // problem.overlap
    return [HeadGroup(slice(n * kv, (n + 1) * kv), slice(n * q, (n + 1) * q)) for n in range(problem.overlap)]


def attend_to_group(attend: Attend, keys: Keys, spans: Spans, group: HeadGroup) -> None:
    """Lets a group's query heads see their keys."""
    if group.q_heads is None:
        attend(keys, spans)
    else:
        attend.heads(keys, spans, group.q_heads)
