"""The keys that a rank has at hand before anything travels: its new tokens, its shard of a sharded cache, the prefixes."""

from __future__ import annotations

from torch import Tensor

from cpattn.exchange.message import Message, message_buffer
from cpattn.exchange.step_rows import prefix_spans
from cpattn.exchange.strategy import ExchangeInputs, Step
from cpattn.keys import Keys
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.moves.moves import moves_for
from cpattn.transports.transport import Transport


def own_rows(inputs: ExchangeInputs, meta: CPMetadata, communicator: Transport) -> tuple[Tensor, Tensor]:
    """K and V of this rank's new tokens, in local order, without a number in them that is not a token's.

    Kernels that load whole tiles would multiply what comes after the tokens by a weight of 0, which is NaN for NaN.
    """
    if meta.bucket is None:
        if meta.num_tokens == meta.rows:
            return inputs.format.pair(inputs.k, inputs.v)
        v = inputs.v if inputs.v is None else inputs.v[: meta.num_tokens]
        return inputs.format.pair(inputs.k[: meta.num_tokens], v)
    # How many tokens there are changes under a captured graph; zeros after them do as well.
    message = message_buffer(communicator, "own rows", inputs.format, meta.rows)
    moves_for(inputs.format.device).pack(message.whole, inputs.k, inputs.v, meta.token_count)
    return message.pair


def write_own(cache: PagedKV, inputs: ExchangeInputs, meta: CPMetadata) -> None:
    """Appends this rank's new tokens to what its pages hold of each request."""
    moves_for(inputs.format.device).write_pages(cache.k_pages, cache.v_pages, cache.page_table, *meta.held_places, inputs.k, inputs.v)


def read_shard_(message: Message, cache: PagedKV, meta: CPMetadata) -> None:
    """Reads all that this rank holds of the batch from its pages, request after request, and zeros after it."""
    moves_for(message.whole.device).read_pages(cache.k_pages, cache.v_pages, cache.page_table, *meta.shard_places, *message.parts)


def prefix_step(inputs: ExchangeInputs, meta: CPMetadata, communicator: Transport) -> Step | None:
    """This rank's queries over prefixes that it has whole, where there are any."""
    cache = inputs.cache
    if cache is None or meta.plan.sharded or (meta.bucket is None and not meta.plan.num_prefix_tokens):
        return None
    if isinstance(cache, PackedKV):
        return Step(Keys(*inputs.format.pair(cache.k, cache.v)), [prefix_spans(meta, inputs.window, paged=False)])
    if inputs.reads_pages:
        keys = Keys(*inputs.format.pair(cache.k_pages, cache.v_pages), cache.page_table)
        return Step(keys, [prefix_spans(meta, inputs.window, paged=True)])
    packed = message_buffer(communicator, "prefix", inputs.format, meta.plan.num_prefix_tokens)
    moves_for(inputs.format.device).read_pages(cache.k_pages, cache.v_pages, cache.page_table, *meta.prefix_places, *packed.parts)
    return Step(Keys(*packed.pair), [prefix_spans(meta, inputs.window, paged=False)])
