"""One forward batch of SGLang as a plan, with the fields that SGLang reads of a batch's metadata."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from cpattn.errors import BatchError, UnsupportedError
from cpattn.integrations.sglang.turns import Turn, turns_of
from cpattn.metadata.cp_metadata import CPMetadata

# The fields that say where SGLang's two blocks of each request lie. Here a request may have one chunk on a rank, or none.
TWO_BLOCKS = frozenset(
    {
        *("split_list", "zigzag_index", "cp_reverse_index", "reverse_split_len"),
        *("total_q_prev_tokens", "total_q_next_tokens"),
        *("max_seqlen_q_prev", "max_seqlen_q_next", "max_seqlen_q_combined"),
        *("kv_len_prev_list", "kv_len_next_list", "actual_seq_q_prev_list", "actual_seq_q_next_list"),
        *("kv_len_prev_tensor", "kv_len_next_tensor", "kv_len_combined_tensor"),
        *("actual_seq_q_prev_tensor", "actual_seq_q_next_tensor", "actual_seq_q_combined_tensor"),
        *("cu_seqlens_q_prev_tensor", "cu_seqlens_q_next_tensor", "cu_seqlens_q_combined_tensor"),
        *("cu_seqlens_kv_prev_tensor", "cu_seqlens_kv_next_tensor", "cu_seqlens_kv_combined_tensor"),
    }
)


def batch_of(num_tokens: int, seqs_len: Sequence[int] | None, extend_seqs_len: Sequence[int] | None) -> list[tuple[int, int]]:
    """``(prefix_len, extend_len)`` of each request, from the lengths that SGLang passes.

    >>> batch_of(9, [10, 5], [4, 5])
    [(6, 4), (0, 5)]

    Args:
        num_tokens: new tokens of all requests, and SGLang's padding after them, which belongs to no request.
        seqs_len: of each request, cached and new tokens.
        extend_seqs_len: of each request, new tokens; None where all of seqs_len are, or, without that, num_tokens of one request.

    Raises:
        BatchError: the lengths do not go together.
    """
    extends = [int(n) for n in (extend_seqs_len if extend_seqs_len is not None else seqs_len or [num_tokens])]
    # Without seqs_len nobody knows what is cached.
    wholes = [int(n) for n in seqs_len or ()] if extend_seqs_len is not None else extends
    fits = len(wholes) == len(extends) and all(whole >= extend >= 0 for whole, extend in zip(wholes, extends, strict=True))
    if not fits or sum(extends) > num_tokens:
        raise BatchError(
            f"SGLang passes num_tokens={num_tokens}, seqs_len={seqs_len}, extend_seqs_len={extend_seqs_len}; each request has at least as "
            "many tokens as new ones, and num_tokens is at least the sum of those: report this with the release of SGLang"
        )
    return [(whole - extend, extend) for whole, extend in zip(wholes, extends, strict=True)]


class NewKV(NamedTuple):
    """One layer's new keys and values on this rank, which its attention writes."""

    layer: Any
    k: Tensor
    v: Tensor
    swa_loc: Tensor | None


class Step:
    """What SGLang keeps as ``forward_batch.attn_cp_metadata``.

    Attributes:
        meta: this rank's metadata.
        total_seq_lens, bs: new tokens and requests.
        per_rank_actual_token: rows of each rank. SGLang pads them, for its collectives and for its graphs, and writes them here.
        per_rank_logical_token: tokens of each rank, once SGLang has padded them.
        max_rank_len: the most rows of a rank, for each.
        new_kv: of the layer that is about to attend.
    """

    def __init__(self, meta: CPMetadata) -> None:
        self.meta = meta
        self.total_seq_lens = int(meta.plan.num_tokens)
        self.bs = len(meta.plan.batch)
        self.per_rank_actual_token = list(meta.plan.rank_tokens)
        self.per_rank_logical_token: list[int] | None = None
        self.max_rank_len = [max(self.per_rank_actual_token)] * meta.plan.cp_size
        self.new_kv: NewKV | None = None

    @property
    def rows(self) -> int:
        """Of this rank, as SGLang pads them."""
        rows: int = self.per_rank_actual_token[self.meta.cp_rank]
        return rows

    @cached_property
    def turns(self) -> list[Turn]:
        """In which SGLang's own kernel attends."""
        return turns_of(self.meta)

    def __getattr__(self, name: str) -> Any:
        if name in TWO_BLOCKS:
            raise UnsupportedError(
                f"a part of SGLang reads {name}, which says where two blocks of each request lie, but cpattn's chunks lie otherwise: "
                "this model is served by SGLang's own strategy (SGLANG_PLUGINS=none)"
            )
        raise AttributeError(name)


def with_rows(x: Tensor, rows: int, dim: int = 0) -> Tensor:
    """x with so many rows along an axis: what is beyond them is padding, and what is missing is zeros."""
    missing = rows - x.shape[dim]
    if missing <= 0:
        return x.narrow(dim, 0, rows) if missing else x
    shape = list(x.shape)
    shape[dim] = rows
    padded = x.new_zeros(shape)
    padded.narrow(dim, 0, x.shape[dim]).copy_(x)
    return padded
