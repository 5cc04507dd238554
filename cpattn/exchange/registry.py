"""The strategies there are, and which one ``"auto"`` stands for."""

from __future__ import annotations

from cpattn.errors import UnknownNameError
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.ring import RING
from cpattn.exchange.strategy import Strategy

STRATEGIES: dict[str, Strategy] = {strategy.name: strategy for strategy in (ALL_GATHER, RING)}

# All-gather is one launch and needs no merging, but holds all keys twice (gathered and in order). Beyond this many
# bytes of keys and values, "auto" takes the ring, which holds two messages.
AUTO_GATHER_LIMIT = 8 * 2**30


def candidate_strategies(name: str, gathered_bytes: int) -> list[Strategy]:
    """The strategy of that name; for ``"auto"`` all, the preferred first. Raises UnknownNameError."""
    if name == "auto":
        return [ALL_GATHER, RING] if gathered_bytes <= AUTO_GATHER_LIMIT else [RING, ALL_GATHER]
    if not isinstance(name, str) or name not in STRATEGIES:
        raise UnknownNameError(f"strategy={name!r} is unknown; choose one of {', '.join(map(repr, ['auto', *STRATEGIES]))}")
    return [STRATEGIES[name]]


# An all-gather of at least this many bytes is split into groups of KV heads unless the caller says otherwise: about
# 0.1 ms of NVLink, several times what further launches cost. An estimate; benchmarks/bench_nccl.py is what would measure it.
OVERLAP_FROM = 32 * 2**20
_OVERLAP_GROUPS = 4


def default_overlap(kv_heads: int, gathered_bytes: int, device_type: str) -> int:
    """Into how many groups of KV heads an all-gather is split if the caller does not say: at most 4, of equal size."""
    if device_type != "cuda" or gathered_bytes < OVERLAP_FROM:
        return 1
    return max(groups for groups in range(1, _OVERLAP_GROUPS + 1) if kv_heads % groups == 0)
