"""A plan as text: a table of the ranks' shares, and a picture of who owns which token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cpattn.metadata.batch import IntArray

if TYPE_CHECKING:
    from cpattn.metadata.plan import Plan

_RANK_MARKS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_PREFIX = "."


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column to the left, all others to the right, a rule under the header."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def form(line: Sequence[str]) -> str:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        return "  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip()

    return "\n".join([form(header), "  ".join("-" * width for width in widths), *map(form, rows)])


def summarize_plan(plan: Plan) -> str:
    """See :meth:`cpattn.Plan.summary`."""
    prefix_tokens = plan.num_prefix_tokens
    lines = [
        f"{len(plan.batch)} requests: {plan.num_tokens:,} new tokens over {prefix_tokens:,} cached ones",
        f"{plan.cp_size} ranks, {plan.partition} partition, {plan.remainder} remainder, "
        f"{plan.rows:,} rows a rank (a multiple of {plan.pad_to})",
        "",
    ]
    all_pairs = sum(plan.rank_pairs)
    table = [
        [str(rank), f"{tokens:,}", f"{plan.rows - tokens:,}", f"{pairs:,}", f"{pairs / all_pairs:.2%}" if all_pairs else "-"]
        for rank, (tokens, pairs) in enumerate(zip(plan.rank_tokens, plan.rank_pairs, strict=True))
    ]
    table.append(["all", f"{plan.num_tokens:,}", f"{plan.cp_size * plan.rows - plan.num_tokens:,}", f"{all_pairs:,}", ""])
    lines.append(text_table(["rank", "tokens", "padding", "query-key pairs", "share"], table))
    lines += ["", f"imbalance (fullest rank over the mean): tokens {plan.token_imbalance:.4f}, pairs {plan.pair_imbalance:.4f}"]
    return "\n".join(lines)


def draw_plan(plan: Plan, width: int) -> str:
    """See :meth:`cpattn.Plan.draw`; a long request is drawn to its own scale, a short one token by token."""
    if not plan.batch:
        return "(no requests)"
    labels = [
        f"request {i:>{len(str(len(plan.batch) - 1))}}: {prefix_len} + {extend_len}"
        for i, (prefix_len, extend_len) in enumerate(plan.batch)
    ]
    label_width = max(map(len, labels))
    lines = [f"{_PREFIX} cached prefix   0 1 2 ... 9 a b ... the rank that has a new token   xN one mark for N tokens"]
    for i, (prefix_len, extend_len) in enumerate(plan.batch):
        tokens_a_mark = max(1, -(-(prefix_len + extend_len) // max(1, width)))
        ends = np.cumsum(np.concatenate([[prefix_len], plan.lengths[i]]))
        marks = "".join(
            _mark(at, min(at + tokens_a_mark, prefix_len + extend_len), ends, plan.chunk_rank)
            for at in range(0, prefix_len + extend_len, tokens_a_mark)
        )
        lines.append(f"{labels[i].ljust(label_width)} |{marks}|" + (f" x{tokens_a_mark}" if tokens_a_mark > 1 else ""))
    return "\n".join(lines)


def _mark(begin: int, end: int, ends: IntArray, chunk_rank: IntArray) -> str:
    """The mark for tokens begin .. end - 1, given where the prefix and each chunk end: the rank that owns most of the
    new ones, which are not lost among cached ones."""
    covered = np.diff(np.clip(ends, begin, end), prepend=begin)[1:]
    if not covered.any():
        return _PREFIX
    return _RANK_MARKS[int(np.bincount(chunk_rank, covered).argmax()) % len(_RANK_MARKS)]
