"""Which batches are decoded."""

from __future__ import annotations

from cpattn.metadata.layout import Layout

# A batch whose requests have no more new tokens than this is decoded: one token each, or some that are speculated.
DECODE_TOKENS = 16


def only_decodes(plan: Layout) -> bool:
    """Whether each request has a few new tokens at most, as in decoding and speculation."""
    return bool((plan.extend_lens <= DECODE_TOKENS).all())
