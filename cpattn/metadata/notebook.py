"""A plan, and one rank's part of it, as a notebook shows them: a small table, and a bar for each request in the colours of ranks.

Plain HTML and SVG, of a size that does not grow with the batch or the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.draw import counted, describe_partition
from cpattn.metadata.kinds import lines_of
from cpattn.metadata.layout import Layout
from cpattn.metadata.rank_colors import PREFIX, ink_on, rank_color

_MOST_BARS = 12
# A bar has at most so many pieces, each in the colour of the rank that owns the token in its middle. A piece with any new token shows
# that one's rank, so that these are not lost among cached ones.
_MOST_PIECES = 128
_LEFT, _BAR, _LINE, _HEIGHT = 190, 512, 20, 14  # pixels
_LEAST_NAMED = 13  # pixels of a rank's name
_OTHERS_OPACITY = 0.25


def plan_html(plan: Layout) -> str:
    """The layout of a batch."""
    return _block(table_of_plan(plan), _picture(plan, None))


def rank_html(plan: Layout, rank: int, of_rank: Sequence[tuple[str, str]]) -> str:
    """One rank's part: what is said of it, and the plan, in which the other ranks are pale."""
    return _block([*of_rank, *table_of_plan(plan)], _picture(plan, rank))


def table_of_plan(plan: Layout) -> list[tuple[str, str]]:
    """Lines of a table: what, and the numbers."""
    return [
        ("requests", f"{len(plan.batch):,}: {plan.num_tokens:,} new tokens over {plan.num_prefix_tokens:,} cached ones"),
        ("ranks", f"{plan.cp_size:,}: {describe_partition(plan)}{plan.cache_in_words}"),
        ("tokens a rank", f"{_range(plan.rank_tokens)}, in {plan.rows:,} rows"),
        ("query-key pairs a rank", _range(plan.rank_pairs)),
        ("fullest rank over the mean", f"tokens {plan.token_imbalance:.4f}, pairs {plan.pair_imbalance:.4f}"),
    ]


def _range(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _block(lines: Sequence[tuple[str, str]], picture: str) -> str:
    cell = "text-align:left;vertical-align:top"
    rows = "".join(f'<tr><th style="{cell}">{escape(what)}</th><td style="{cell}">{escape(said)}</td></tr>' for what, said in lines)
    return f"<div><table>{rows}</table>{picture}</div>"


def _picture(plan: Layout, rank: int | None) -> str:
    """A bar a request, or for those that are alike, to its own scale: cached tokens grey, new ones in their ranks' colours."""
    drawn = [kind for kind in lines_of(plan, _MOST_BARS) if kind.prefix_len + kind.extend_len]
    if not drawn:
        return ""
    request, start, length, owner = plan.chunk_table
    height = _LINE * len(drawn) + 2
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _BAR}" height="{height}" font-family="sans-serif" font-size="11">']
    for line, (prefix_len, extend_len, requests) in enumerate(drawn):
        own = slice(*np.searchsorted(request, [requests[0], requests[0] + 1]))
        y = line * _LINE + 2
        name = f"request {requests[0]}" if len(requests) == 1 else counted(len(requests), "request")
        parts.append(f'<text x="0" y="{y + 11}" fill="currentColor">{name}: {prefix_len:,} + {extend_len:,}</text>')
        parts += _bar(prefix_len, extend_len, start[own] + length[own], owner[own], y, rank)
    parts.append("</svg>")
    shown = sum(len(kind.requests) for kind in drawn)
    legend = "grey: cached tokens; numbers: the ranks that own the new ones"
    legend += f"; {shown:,} of {len(plan.batch):,} requests, those with the most work" if shown < len(plan.batch) else ""
    return f"{''.join(parts)}<div><small>{legend}</small></div>"


def _bar(prefix_len: int, extend_len: int, ends: IntArray, owners: IntArray, y: int, rank: int | None) -> Iterator[str]:
    """The pieces of a request, given where its chunks end; neighbours of one colour are one."""
    total = prefix_len + extend_len
    pieces = min(total, _MOST_PIECES)
    numbers = np.arange(pieces)
    middles, lasts = (2 * numbers + 1) * total // (2 * pieces), -(-(numbers + 1) * total // pieces) - 1
    of_piece = np.full(pieces, -1)
    has_new = lasts >= prefix_len
    of_piece[has_new] = owners[np.searchsorted(ends, np.maximum(middles[has_new] - prefix_len, 0), side="right")]
    begins = [0, *(np.flatnonzero(np.diff(of_piece)) + 1).tolist()]
    for begin, end in zip(begins, [*begins[1:], pieces], strict=True):
        owner = int(of_piece[begin])
        x, width = _LEFT + begin * _BAR / pieces, (end - begin) * _BAR / pieces
        color = PREFIX if owner < 0 else rank_color(owner)
        pale = f' opacity="{_OTHERS_OPACITY}"' if rank is not None and 0 <= owner != rank else ""
        yield f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{_HEIGHT}" fill="{color}"{pale}/>'
        if owner >= 0 and not pale and width >= _LEAST_NAMED + 6 * (len(str(owner)) - 1):
            yield f'<text x="{x + width / 2:g}" y="{y + 11}" text-anchor="middle" fill="{ink_on(color)}">{owner}</text>'
