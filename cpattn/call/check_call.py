"""What is refused of the arguments of a call, whichever strategy and backend could serve it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cpattn.attention.backend import AttentionOptions
from cpattn.call import checks
from cpattn.call.arguments import Arguments
from cpattn.call.cache_checks import check_cache
from cpattn.call.expand_checks import check_expand
from cpattn.call.page_checks import check_attend, check_writable
from cpattn.call.tensor_kinds import check_no_fp8
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.registry import STRATEGIES
from cpattn.exchange.resident_shards import is_resident
from cpattn.exchange.strategy import Strategy
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata


def check_arguments(arguments: Arguments, meta: CPMetadata, *, with_cache: bool = True) -> AttentionOptions:
    """What is refused of the arguments of a call, but for what no strategy or backend can serve.

    Args:
        with_cache: whether a cache that the plan needs may not be missing.
    """
    q, k, v, cache = arguments.q, arguments.k, arguments.v, arguments.kv_cache
    if is_resident(arguments.strategy):
        check_attend(q, cache, arguments.v_dim, meta, arguments.backend)
    else:
        if arguments.expand is None:
            checks.check_qkv(q, k, v, arguments.v_dim, meta)
        else:
            check_expand(arguments, meta)
        assert k is not None  # checked
        check_no_fp8("q", q.dtype)
        if with_cache:
            check_cache(cache, k, v, meta, _own_heads(arguments, meta))
        checks.check_overlap(arguments.overlap, k)
    wants_window = _brings_what_windows_reach(arguments, meta)
    options = checks.parse_options(q, meta, arguments.scale, arguments.window, arguments.softcap, arguments.sinks, wants_window)
    if arguments.out is not None:
        v_like = v if v is not None else cache.v_pages if k is None and isinstance(cache, PagedKV) else None
        checks.check_out(arguments.out, q, int(arguments.v_dim or 0) if v_like is None else v_like.shape[-1])
    return options


def _asked_for(arguments: Arguments) -> Strategy | None:
    """The strategy of that name, or that is given; None for "auto", and for what is none."""
    given: Any = arguments.strategy
    strategy = STRATEGIES.get(given) if isinstance(given, str) else given
    return strategy if isinstance(strategy, Strategy) else None


def _brings_what_windows_reach(arguments: Arguments, meta: CPMetadata) -> bool:
    """Whether the strategy that is asked for brings that much of a sharded cache, and no more."""
    strategy = _asked_for(arguments)
    return meta.plan.sharded and strategy is not None and strategy.served_by(meta.plan) is ALL_GATHER


def _own_heads(arguments: Arguments, meta: CPMetadata) -> int | None:
    """How many KV heads this rank has, where the strategy that is asked for divides them: a cache may have those alone.

    As many as there are where it cannot divide them so, which is refused later, with the reason.
    """
    strategy = _asked_for(arguments)
    if strategy is None or arguments.k is None:
        return None
    heads = strategy.cached_heads(arguments.q.shape[1], arguments.k.shape[1], meta.plan.cp_size, meta.cp_rank)
    cache: Any = arguments.kv_cache
    if heads is None and strategy.divides_heads and isinstance(cache, PackedKV | PagedKV):
        first = cache.k_pages if isinstance(cache, PagedKV) else cache.k
        return int(first.shape[-2]) if isinstance(first, Tensor) and first.ndim > 1 else None
    return heads


def check_written(arguments: Arguments) -> None:
    """That the pages that a call writes can be written."""
    if isinstance(arguments.kv_cache, PagedKV) and not is_resident(arguments.strategy):
        check_writable(arguments.kv_cache)
