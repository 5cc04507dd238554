"""Hybrids: ranks within a group divide heads, and a ring or an all-gather serves the groups.

Fang and Zhao, USP: A Unified Sequence Parallelism Approach for Long Context Generative AI, arXiv:2405.07719. What travels across groups are
K and V of a rank's heads alone: of each group's rows every head crosses once to every other group.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from cpattn.errors import OptionError, UnknownNameError, shown
from cpattn.exchange.all_gather import ALL_GATHER
from cpattn.exchange.divided_heads import DividedHeads, divide_heads
from cpattn.exchange.ring import RING
from cpattn.exchange.strategy import Strategy
from cpattn.metadata.batch import is_integer

ACROSS: dict[str, Strategy] = {strategy.name: strategy for strategy in (RING, ALL_GATHER)}
"""What serves groups."""


class Hybrid(DividedHeads):
    """What :func:`hybrid` makes."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as what it was made from: the same object again."""
        assert self.across is not None
        return hybrid, (self.within, self.across.name)


def hybrid(within: int, across: str = "ring") -> Strategy:
    """A strategy of two dimensions, for ``strategy=``: ranks that follow each other divide heads, and keys travel across their groups.

    >>> import cpattn, torch
    >>> plan = cpattn.plan([(0, 40)], cp_size=4)
    >>> q, k = torch.randn(40, 4, 8), torch.randn(40, 2, 8)
    >>> def program(group):
    ...     meta = plan.metadata(group.rank)
    ...     q_local, k_local = (cpattn.shard(x, meta) for x in (q, k))
    ...     out = cpattn.cp_attention(q_local, k_local, k_local, meta, group=group, strategy=cpattn.hybrid(within=2))
    ...     return cpattn.unshard(out, meta, group=group)
    >>> whole = cpattn.testing.run_loopback(program, size=4)[0]
    >>> alone = cpattn.cp_attention(q, k, k, cpattn.build_metadata([(0, 40)], 1, 0))
    >>> bool((whole - alone).abs().max() < 1e-5)
    True

    Rank r is in group ``r // within``, and has the share ``r % within`` of the heads. ``Transport.split(groups, within)`` lays ranks out
    so, and a DeviceMesh ``(groups, within)``, which ``group=`` takes whole. The ranks of a host, which follow each other, then divide
    heads over its fast links. The layout of the batch is the plan's, whatever the group is: any divisor of ``cp_size`` will do that is not
    above the number of query heads. With one group it does what ``"ulysses"`` does, and with groups of one rank what ``across`` does.

    Args:
        within: the ranks of a group.
        across: ``"ring"`` or ``"all_gather"``.

    Returns:
        A Strategy, the same object for the same arguments. Its ``name`` says them.

    Raises:
        OptionError: within is no integer of at least 1.
        UnknownNameError: across is neither.
    """
    given: Any = within
    if not is_integer(given) or given < 1:
        raise OptionError(f"within={shown(given)}; pass the ranks of a group that divides heads, an integer of at least 1")
    if not isinstance(across, str) or across not in ACROSS:
        raise UnknownNameError(f"across={shown(across)} is unknown; choose one of {', '.join(map(repr, ACROSS))}")
    return _made(int(given), across)


@cache
def _made(within: int, across: str) -> DividedHeads:
    strategy = ACROSS[across]
    name = f"hybrid({within}, {across!r})"
    travels = f"queries, keys and values by heads within groups of {within}, {strategy.travels} across"
    return divide_heads(Hybrid, name, within, strategy, travels)
