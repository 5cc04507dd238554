"""A plan as text: a table of the ranks' shares, and a picture of who owns which token."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.layout import Layout

_RANK_MARKS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PREFIX = "."
_LEGEND = f"{_PREFIX} cached token   0 1 .. 9 a b ..: new token, by its rank   xN: N tokens a mark"


def rank_mark(rank: int) -> str:
    """The letter or digit that stands for a rank."""
    return _RANK_MARKS[rank % len(_RANK_MARKS)]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A plain table: the columns numbered in ``left`` to the left, all others to the right, a rule under the header."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def form(line: Sequence[str]) -> str:
        cells = [line[i].ljust(width) if i in left else line[i].rjust(width) for i, width in enumerate(widths)]
        return "  ".join(cells).rstrip()

    return "\n".join([form(header), "  ".join("-" * width for width in widths), *map(form, rows)])


def summarize_plan(plan: Layout) -> str:
    """See :meth:`cpattn.Plan.summary`."""
    return "\n".join([describe_plan(plan), "", text_table(*share_table(plan)), "", describe_imbalance(plan)])


def describe_plan(plan: Layout) -> str:
    """Two lines: the batch, and the layout."""
    requests = "1 request" if len(plan.batch) == 1 else f"{len(plan.batch):,} requests"
    return (
        f"{requests}: {plan.num_tokens:,} new tokens over {plan.num_prefix_tokens:,} cached ones\n"
        f"{plan.cp_size} ranks, {describe_partition(plan)}, "
        f"{plan.rows:,} rows a rank (a multiple of {plan.pad_to})"
    )


def describe_partition(plan: Layout) -> str:
    """Its partition, with the remainder rule where it has one."""
    return f"{plan.partition} partition" if plan.is_callers else f"{plan.partition} partition, {plan.remainder} remainder"


def share_table(plan: Layout) -> tuple[list[str], list[list[str]]]:
    """A header and a line a rank: its tokens, padding and query-key pairs; then one for all."""
    all_pairs = sum(plan.rank_pairs)
    table = [
        [str(rank), f"{tokens:,}", f"{plan.rows - tokens:,}", f"{pairs:,}", f"{pairs / all_pairs:.2%}" if all_pairs else "-"]
        for rank, (tokens, pairs) in enumerate(zip(plan.rank_tokens, plan.rank_pairs, strict=True))
    ]
    table.append(["all", f"{plan.num_tokens:,}", f"{plan.cp_size * plan.rows - plan.num_tokens:,}", f"{all_pairs:,}", ""])
    return ["rank", "tokens", "padding", "query-key pairs", "share"], table


def describe_imbalance(plan: Layout) -> str:
    """One line: how far the fullest rank is from the mean."""
    return f"imbalance (fullest rank over the mean): tokens {plan.token_imbalance:.4f}, pairs {plan.pair_imbalance:.4f}"


def draw_plan(plan: Layout, width: int) -> str:
    """See :meth:`cpattn.Plan.draw`; a long request is drawn to its own scale, a short one token by token."""
    if not plan.batch:
        return "(no requests)"
    labels = [
        f"request {i:>{len(str(len(plan.batch) - 1))}}: {prefix_len} + {extend_len}"
        for i, (prefix_len, extend_len) in enumerate(plan.batch)
    ]
    label_width = max(map(len, labels))
    lines = [_LEGEND]
    request, start, length, rank = plan.chunk_table
    bounds = np.searchsorted(request, np.arange(len(plan.batch) + 1))
    for i, (prefix_len, extend_len) in enumerate(plan.batch):
        tokens_a_mark = max(1, -(-(prefix_len + extend_len) // max(1, width)))
        own = slice(bounds[i], bounds[i + 1])
        ends = prefix_len + np.concatenate([[0], start[own] + length[own]])
        marks = "".join(
            _mark(at, min(at + tokens_a_mark, prefix_len + extend_len), ends, rank[own])
            for at in range(0, prefix_len + extend_len, tokens_a_mark)
        )
        lines.append(f"{labels[i].ljust(label_width)} |{marks}|" + (f" x{tokens_a_mark}" if tokens_a_mark > 1 else ""))
    return "\n".join(lines)


def _mark(begin: int, end: int, ends: IntArray, ranks: IntArray) -> str:
    """The mark for tokens begin .. end - 1, given where the prefix and each chunk end. It is the rank that owns most of the
    new ones, so that these are not lost among cached ones."""
    covered = np.diff(np.clip(ends, begin, end), prepend=begin)[1:]
    if not covered.any():
        return _PREFIX
    return rank_mark(int(np.bincount(ranks, covered).argmax()))
