"""A plan as a picture: query rows against the keys that they see, in the colour of the rank that computes them."""

from __future__ import annotations

from pathlib import Path

from cpattn.metadata.plan import Plan
from cpattn.viz.plan_chunks import draw_chunks
from cpattn.viz.plan_tokens import draw_tokens

# What can be drawn token by token so that its numbers can be read.
_MOST_TOKENS, _LONGEST_REQUEST, _MOST_REQUESTS, _MOST_RANKS = 96, 40, 12, 8


def draw_plan_picture(plan: Plan, path: str | Path) -> None:
    """Draws a panel a request, queries down and keys across, and below them the rows that each rank holds, and its part of a sharded cache.

    A small plan is drawn token by token, with each token's position; a large one chunk by chunk, each request to its own
    scale. Equal requests share a panel, and of many panels those with the most work are drawn.

    Args:
        plan: any plan.
        path: a .png, .svg or .pdf.

    Raises PictureError.
    """
    if is_small(plan):
        draw_tokens(plan, path)
    else:
        draw_chunks(plan, path)


def is_small(plan: Plan) -> bool:
    """Whether the plan is drawn token by token."""
    return (
        plan.num_tokens <= _MOST_TOKENS
        and len(plan.batch) <= _MOST_REQUESTS
        and plan.cp_size <= _MOST_RANKS
        and plan.rows <= _LONGEST_REQUEST
        and max((prefix_len + extend_len for prefix_len, extend_len in plan.batch), default=0) <= _LONGEST_REQUEST
    )
