"""The strategies there are, and which one ``"auto"`` stands for."""

from __future__ import annotations

from torch import Tensor

from cpattn.errors import UnknownNameError, UnsupportedError
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.message import KVFormat
from cpattn.exchange.pass_q import PASS_Q, PASS_Q_RING
from cpattn.exchange.ring import RING
from cpattn.exchange.strategy import Strategy
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.plan import Plan

STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in (ALL_GATHER, RING, PASS_Q, PASS_Q_RING)}
"""What ``strategy=`` takes by name: ``all_gather`` and ``ring`` (keys travel), ``pass_q`` and ``pass_q_ring`` (queries do).
``"auto"`` chooses by sizes alone, and so alike on every rank."""

# All-gather is one launch and needs no merging, but holds all keys twice (gathered and in order). Beyond this many
# bytes of keys and values, "auto" takes the ring, which holds two messages.
AUTO_GATHER_LIMIT = 8 * 2**30
# Gathered queries and their results are held for all ranks at once; beyond this many bytes "auto" sends them around.
AUTO_GATHER_QUERIES_LIMIT = 256 * 2**20
# A batch whose requests have no more new tokens than this is decoded: one token each, or some that are speculated.
DECODE_TOKENS = 16


def candidate_strategies(
    name: str, q: Tensor, kv: KVFormat, meta: CPMetadata, cache: PackedKV | PagedKV | None, window: int | None
) -> list[Strategy]:
    """The strategy of that name; for ``"auto"`` those that can serve the plan, the preferred first.

    Raises UnknownNameError, or UnsupportedError where the one that is named, or any, can not serve the plan.
    """
    if name != "auto" and (not isinstance(name, str) or name not in STRATEGIES):
        raise UnknownNameError(f"strategy={name!r} is unknown; choose one of {', '.join(map(repr, ['auto', *STRATEGIES]))}")
    reasons = {strategy.name: strategy.why_not(meta, cache, window) for strategy in STRATEGIES.values()}
    able = [other for other in STRATEGIES if reasons[other] is None]
    if name != "auto":
        if reasons[name] is not None:
            others = ", ".join(map(repr, able)) or "none"
            raise UnsupportedError(f"strategy={name!r} can not serve this call: {reasons[name]}; {others} could")
        return [STRATEGIES[name]]
    if not able:
        raise UnsupportedError("no strategy can serve this call: " + "; ".join(f"{other}: {reason}" for other, reason in reasons.items()))
    return [STRATEGIES[other] for other in _preferred(q, kv, meta, cache) if other in able]


def _preferred(q: Tensor, kv: KVFormat, meta: CPMetadata, cache: PackedKV | PagedKV | None) -> list[str]:
    rows, heads, head_dim = q.shape
    token_bytes = kv.heads * kv.width * kv.dtype.itemsize
    if not meta.plan.sharded:
        # Pages are not copied, at least where a backend reads them.
        copied = 0 if isinstance(cache, PagedKV) else meta.plan.num_prefix_tokens
        gathered = (meta.plan.cp_size * meta.rows + copied) * token_bytes
        return ["all_gather", "ring"] if gathered <= AUTO_GATHER_LIMIT else ["ring", "all_gather"]
    # What one rank sends to another: queries and fp32 results, or a shard of keys.
    query_bytes = rows * heads * (head_dim * kv.dtype.itemsize + 4 * (kv.v_head_dim + 1))
    pass_q = ["pass_q", "pass_q_ring"] if meta.plan.cp_size * query_bytes <= AUTO_GATHER_QUERIES_LIMIT else ["pass_q_ring", "pass_q"]
    if only_decodes(meta.plan):
        # A ring copies each rank's shard out of its pages and sends all of them around, for a handful of queries: between two
        # H100, 256 x (8k + 1) over pages of 64 tokens took 16.9 ms with it and 1.5 ms with pass_q. Over short contexts its bytes
        # are fewer, but it still copies, waits for each hop and merges.
        return pass_q
    return [*pass_q, "ring"] if query_bytes <= meta.plan.largest_shard * token_bytes else ["ring", *pass_q]


def only_decodes(plan: Plan) -> bool:
    """Whether each request has a few new tokens at most, as in decoding and speculation."""
    return bool((plan.extend_lens <= DECODE_TOKENS).all())
