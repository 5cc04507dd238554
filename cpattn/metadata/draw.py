"""A plan as text: a table of the ranks' shares, and a picture of who owns which token."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.holders import Holder, holder_of
from cpattn.metadata.kinds import Kind, lines_of
from cpattn.metadata.layout import Layout

RANK_MARKS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PREFIX = "."
_LEGEND = f"{_PREFIX} cached token   0 1 .. 9 a b ..: new token, by its rank   xN: N tokens a mark"
# A batch of more requests is drawn by kind, and in no more lines than a terminal has.
_MOST_LINES = 24
# Beside the line that says where a request's tokens lie, where caches are sharded.
_HELD_BY, _SEVERAL = "  held by", "*"
_HELD_LEGEND = f"held by: the rank whose cache holds a token after the step   {_SEVERAL} several ranks"
_COUNTS_LEGEND = "of cached tokens only counts are known: they stand by rank, not by position"


def rank_mark(rank: int) -> str:
    """The letter or digit that stands for a rank."""
    return RANK_MARKS[rank % len(RANK_MARKS)]


def counted(number: int, thing: str) -> str:
    """A number and what it counts.

    >>> counted(1, "rank"), counted(4096, "row")
    ('1 rank', '4,096 rows')
    """
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


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
    return (
        f"{counted(len(plan.batch), 'request')}: {plan.num_tokens:,} new tokens over {plan.num_prefix_tokens:,} cached ones"
        f"{plan.cache_in_words}\n"
        f"{counted(plan.cp_size, 'rank')}, {describe_partition(plan)}, "
        f"{counted(plan.rows, 'row')} a rank (a multiple of {plan.pad_to})"
    )


def describe_partition(plan: Layout) -> str:
    """Its partition, with the remainder rule where it has one."""
    return f"{plan.partition} partition, {plan.remainder} remainder" if plan.cuts_alike else f"{plan.partition} partition"


def share_table(plan: Layout) -> tuple[list[str], list[list[str]]]:
    """A header and a line a rank: its tokens, padding and query-key pairs, and of a sharded cache the tokens that it holds after the
    step; then one for all."""
    all_pairs = sum(plan.rank_pairs)
    table = [
        [str(rank), f"{tokens:,}", f"{plan.rows - tokens:,}", f"{pairs:,}", f"{pairs / all_pairs:.2%}" if all_pairs else "-"]
        for rank, (tokens, pairs) in enumerate(zip(plan.rank_tokens, plan.rank_pairs, strict=True))
    ]
    table.append(["all", f"{plan.num_tokens:,}", f"{plan.cp_size * plan.rows - plan.num_tokens:,}", f"{all_pairs:,}", ""])
    header = ["rank", "tokens", "padding", "query-key pairs", "share"]
    if plan.sharded:
        held = plan.held_lens.sum(axis=0).tolist()
        header.append("held")
        for line, tokens in zip(table, [*held, sum(held)], strict=True):
            line.append(f"{tokens:,}")
    return header, table


def describe_imbalance(plan: Layout) -> str:
    """One line: how far the fullest rank is from the mean."""
    return f"imbalance (fullest rank over the mean): tokens {plan.token_imbalance:.4f}, pairs {plan.pair_imbalance:.4f}"


def describe_busiest(plan: Layout) -> str:
    """How much work the rank with the most of it has."""
    if not any(plan.rank_pairs):
        return "nothing to compute"
    return f"the busiest rank has {plan.pair_imbalance:.2f} times the mean"


def draw_plan(plan: Layout, width: int) -> str:
    """See :meth:`cpattn.Plan.draw`."""
    if not plan.batch:
        return "(no requests)"
    kinds = lines_of(plan, _MOST_LINES // (1 + plan.sharded), held_alike=True)
    number_width = len(str(max(kind.requests[0] for kind in kinds)))
    labels = [
        (f"request {kind.requests[0]:>{number_width}}" if len(kind.requests) == 1 else counted(len(kind.requests), "request"))
        + f": {kind.prefix_len} + {kind.extend_len}"
        for kind in kinds
    ]
    label_width = max(map(len, labels))
    lines = [_legend(plan.cp_size)]
    if plan.sharded:
        lines += [_HELD_LEGEND] if plan.knows_positions or not plan.num_prefix_tokens else [_HELD_LEGEND, _COUNTS_LEGEND]
    for kind, label in zip(kinds, labels, strict=True):
        tokens_a_mark = max(1, -(-(kind.prefix_len + kind.extend_len) // max(1, width)))
        marks = _marks(plan, kind, tokens_a_mark)
        lines.append(f"{label.ljust(label_width)} |{marks}|" + (f" x{tokens_a_mark}" if tokens_a_mark > 1 else ""))
        if plan.sharded:
            held = _held_marks(holder_of(plan, kind.requests[0]), kind.prefix_len + kind.extend_len, tokens_a_mark)
            lines.append(f"{_HELD_BY.ljust(label_width)} |{held}|")
    left_out = len(plan.batch) - sum(len(kind.requests) for kind in kinds)
    if left_out:
        lines.append(f"and {left_out:,} more")
    return "\n".join(lines)


def _legend(cp_size: int) -> str:
    """What the marks mean."""
    if cp_size <= len(RANK_MARKS):
        return _LEGEND
    return f"{_LEGEND}\n{len(RANK_MARKS)} ranks have a mark of their own; rank {len(RANK_MARKS)} has that of rank 0, and so on"


def _marks(plan: Layout, kind: Kind, tokens_a_mark: int) -> str:
    """The bar of a kind, from its first request."""
    request, start, length, rank = plan.chunk_table
    own = slice(*np.searchsorted(request, [kind.requests[0], kind.requests[0] + 1]))
    ends = kind.prefix_len + np.concatenate([[0], start[own] + length[own]])
    total = kind.prefix_len + kind.extend_len
    return "".join(_mark(at, min(at + tokens_a_mark, total), ends, rank[own]) for at in range(0, total, tokens_a_mark))


def _mark(begin: int, end: int, ends: IntArray, ranks: IntArray) -> str:
    """The mark for tokens begin .. end - 1, given where the prefix and each chunk end. It is the rank that owns most of the
    new ones, so that these are not lost among cached ones."""
    covered = np.diff(np.clip(ends, begin, end), prepend=begin)[1:]
    if not covered.any():
        return _PREFIX
    return rank_mark(int(np.bincount(ranks, covered).argmax()))


def _held_marks(holder: Holder, total: int, tokens_a_mark: int) -> str:
    """The bar of who holds a request's tokens."""
    ranks = [holder(at, min(at + tokens_a_mark, total)) for at in range(0, total, tokens_a_mark)]
    return "".join(_SEVERAL if rank is None else rank_mark(rank) for rank in ranks)
