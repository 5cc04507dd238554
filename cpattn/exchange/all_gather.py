"""Strategy ``all_gather``: every rank receives all K and V, puts them in order, and computes in one launch."""

from __future__ import annotations

from collections.abc import Iterator

from cpattn.attention.rows import RaggedRows
from cpattn.exchange.communicator import Communicator
from cpattn.exchange.message import gather_rows_, message_buffer, pack_, unpack
from cpattn.exchange.strategy import LocalKV, Step, Strategy
from cpattn.metadata.cp_metadata import CPMetadata


def _steps(local: LocalKV, meta: CPMetadata, communicator: Communicator, window: int | None) -> Iterator[Step]:
    k, v, prefix = local.k, local.v, local.prefix
    rows = meta.derive("all_gather rows", lambda: _rows(meta))
    cp_size = meta.plan.cp_size
    if cp_size == 1 and prefix is None:
        yield Step(k[: meta.num_tokens], v[: meta.num_tokens], rows)
        return
    prefix_tokens = 0 if prefix is None else len(prefix.k)
    source = message_buffer(communicator, "gathered", k, v, cp_size * meta.rows + prefix_tokens)
    gathered, cached = source[: cp_size * meta.rows], source[cp_size * meta.rows :]
    # The message is packed where the gather would put it, which spares a copy of it.
    message = gathered[meta.cp_rank * meta.rows :][: meta.rows]
    pack_(message, k, v, meta.num_tokens)
    gather = communicator.all_gather(gathered, message)
    if prefix is not None:
        pack_(cached, prefix.k, prefix.v, prefix_tokens)
    gather.wait()
    # From rank-major order to each request's prefix and extend in one piece: K, V and prefix by one index.
    ordered = message_buffer(communicator, "ordered", k, v, len(meta.key_index))
    gather_rows_(ordered, source, meta.key_index)
    yield Step(*unpack(ordered, k.shape[2]), rows)


def _rows(meta: CPMetadata) -> RaggedRows:
    chunks = meta.chunk_host
    # Causal over the whole context: the chunk's last query sees the range's last key.
    return RaggedRows.build(chunks.q_len, meta.k_starts[chunks.request], chunks.k_len, chunks.k_len - chunks.q_len + 1, meta.device)


ALL_GATHER = Strategy(
    name="all_gather",
    steps=_steps,
    num_steps=lambda plan, window: 1,
    alignments=lambda plan, window: frozenset({"bottom_right"}),
)
