"""Whether ranks that have large requests whole can come out even: a bound, so that divisions are spared which cannot.

A request that takes most of a rank's pairs, but not of its tokens, wants sparse tokens beside it, and a batch has only so many.
So do all such requests together, as no two of them fit on one rank. Likewise those that take most of a rank's tokens want
dense ones.
"""

from __future__ import annotations

import numpy as np

from cpattn.device_tables import IntArray
from cpattn.metadata.whole.work import BITS, Work


def may_come_out(work: Work, whole: IntArray, tolerance: int) -> bool:
    """False where ranks that have these requests whole must be off by more than a part of their share in pairs: one in ``tolerance``.

    Other requests may be cut, and pairs of a piece are in proportion to its tokens. Ranks have whole tokens, less than one more or fewer
    than their share.
    """
    token = -(-(1 << BITS) // max(work.all_tokens, 1))
    # What takes hardly any tokens has a density all the same.
    by_density = ((work.pair_part << BITS) // np.maximum(work.token_part, 1)).argsort(kind="stable")
    tokens, pairs = (np.concatenate([[0], parts[by_density].cumsum()]) for parts in (work.token_part, work.pair_part))

    def sparsest(wanted: IntArray) -> IntArray:
        """The pairs of so many of the sparsest tokens."""
        end = np.minimum(tokens.searchsorted(wanted, side="right"), len(tokens) - 1)
        part = np.minimum(wanted, tokens[end]) - tokens[end - 1]
        found: IntArray = pairs[end - 1] + (pairs[end] - pairs[end - 1]) * part // np.maximum(tokens[end] - tokens[end - 1], 1)
        return found

    for parts, others in ((work.pair_part, work.token_part), (work.token_part, work.pair_part)):
        # Two that take more than this do not fit on one rank, though pairs may be off.
        large = whole[2 * parts[whole] > work.share + max(work.share // tolerance, token)]
        if not len(large):
            continue
        # By how little of the one goes with the other, as many together as want the most.
        large = large[(others[large] - parts[large]).argsort(kind="stable")]
        together = np.arange(1, len(large) + 1)
        room = work.share * together - work.token_part[large].cumsum()
        lacking = work.share * together - work.pair_part[large].cumsum()
        slack = work.share // tolerance * together
        if parts is work.pair_part:
            comes_out = sparsest(np.maximum(room - token * together, 0)) <= lacking + slack
        else:
            others_room = np.maximum(tokens[-1] - np.maximum(room + token * together, 0), 0)
            comes_out = pairs[-1] - sparsest(others_room) >= lacking - slack
        if not comes_out.all():
            return False
    return True
