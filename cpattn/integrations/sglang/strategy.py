"""SGLang's calls on a context-parallel strategy, answered by cpattn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cpattn.api import cp_attention, shard, unshard
from cpattn.errors import UnsupportedError
from cpattn.integrations.sglang import engine
from cpattn.integrations.sglang.asked import asked_of
from cpattn.integrations.sglang.step import NewKV, Step, batch_of, with_rows
from cpattn.integrations.sglang.turns import attend_in_turns
from cpattn.metadata.plan import plan
from cpattn.serving import attend, gather_kv


class CPAttnStrategy:
    """What :func:`replace_zigzag` puts before SGLang's own class, from which the name, the kind and all else come.

    A batch is planned with ``partition="auto"``: requests may stay whole on a rank, and ranks differ by a token at most. Keys and
    values that SGLang wants written are kept until the same layer attends. Then :func:`cpattn.cp_attention` does both at once, over the
    memory of SGLang's pool. Where a layer asks for what cpattn's kernels do not have, they travel in one message, the pool writes them,
    and SGLang's own kernel attends.

    Attributes:
        cp_size, cp_rank: of SGLang's attention CP group.
    """

    cp_size: int
    cp_rank: int

    def can_apply(self, num_tokens: int, forward_batch: Any) -> bool:
        """Whether the batch is split: any extend in which each rank gets two tokens or more, however short its requests are."""
        mode = getattr(forward_batch, "forward_mode", None)
        if self.cp_size <= 1 or (mode is not None and not mode.is_context_parallel_extend()):
            return False
        lengths = getattr(forward_batch, "extend_seq_lens_cpu", None)
        # With them an engine's padding does not count.
        return (num_tokens if lengths is None else int(sum(lengths))) >= 2 * self.cp_size

    def build_metadata(self, num_tokens: int, seqs_len: Sequence[int] | None, extend_seqs_len: Sequence[int] | None = None) -> Step:
        """The plan of a batch, once a forward. Its rows are those that SGLang pads to."""
        batch = batch_of(num_tokens, seqs_len, extend_seqs_len)
        # One request alone is cut whatever "auto" thinks of it, which takes it longer than the rest of this.
        many = sum(extend > 0 for _, extend in batch)
        made = plan(batch, self.cp_size, partition="auto" if many > 1 else "zigzag", pad_to=2 * self.cp_size)
        return Step(made.metadata(self.cp_rank, engine.device()))

    def shard_hidden_states(self, x: Tensor, forward_batch: Any) -> Tensor:
        """This rank's rows of ``[tokens, ...]``."""
        step: Step = forward_batch.attn_cp_metadata
        return with_rows(shard(x[: step.total_seq_lens], step.meta), step.rows)

    def shard_position_ids(self, positions: Tensor, forward_batch: Any) -> Tensor:
        """This rank's part of ``[..., tokens]``."""
        step: Step = forward_batch.attn_cp_metadata
        return with_rows(shard(positions[..., : step.total_seq_lens], step.meta, dim=-1), step.rows, dim=-1)

    def gather_hidden_states(self, x: Tensor, forward_batch: Any, stream: Any = None) -> Tensor:
        """``[tokens, ...]`` of all ranks, in their order, on every rank."""
        step: Step = forward_batch.attn_cp_metadata
        self._write_held(forward_batch)
        return unshard(with_rows(x, step.meta.rows), step.meta, group=engine.cp_group())

    def gather_kv_cache(self, x: Tensor, forward_batch: Any, stream: Any = None) -> Tensor:
        """As of hidden states."""
        return self.gather_hidden_states(x, forward_batch, stream)

    def local_q_indices(self, num_tokens: int, forward_batch: Any) -> Tensor:
        """int64: which tokens of the batch this rank has, in the order of its rows."""
        meta = forward_batch.attn_cp_metadata.meta
        indices: Tensor = meta.token_index[: meta.num_tokens].long()
        return indices

    def materialize_full_kv(
        self, forward_batch: Any, layer: Any = None, k: Any = None, v: Any = None, swa_loc: Tensor | None = None
    ) -> None:
        """Keeps a layer's new keys and values until it attends, which follows at once."""
        self._write_held(forward_batch)
        heads = layer.tp_k_head_num
        forward_batch.attn_cp_metadata.new_kv = NewKV(layer, k.view(len(k), heads, -1), v.view(len(v), heads, -1), swa_loc)

    def materialize_full_mla_kv(self, forward_batch: Any, layer: Any, k_nope: Tensor, k_rope: Tensor) -> None:
        """Brings a layer's new latents together in one message, and has the pool write them."""
        latent = self.gather_kv_cache(torch.cat([k_nope, k_rope], dim=-1), forward_batch)
        rank = k_nope.shape[-1]
        engine.set_latent(forward_batch, layer, latent[..., :rank], latent[..., rank:])

    def get_supported_attention_backend(self) -> list[Any]:
        """fa3 and fa4."""
        return [engine.flash_attention()]

    def run_attention(
        self, q: Tensor, forward_batch: Any, device: Any, attn_fn: Callable[..., Tensor], attention_backend: Any = None
    ) -> Tensor:
        """This rank's attention, over the pool with all new keys and values in it; 0 on padding.

        Args:
            q: ``[rows, Hq, D]``.
            attn_fn: attends with SGLang's own kernel.

        Raises:
            UnsupportedError: for an attention backend of SGLang's other than fa3 and fa4.
            CPError: in its other subclasses, as ``cp_attention``.
        """
        if attention_backend is not None and attention_backend not in self.get_supported_attention_backend():
            raise UnsupportedError(
                f"SGLang's attention backend is of the kind {attention_backend.name}; cpattn knows how fa3 and fa4 call a strategy: "
                "pass --prefill-attention-backend fa3 or fa4, or leave the plugin out (SGLANG_PLUGINS=none)"
            )
        step: Step = forward_batch.attn_cp_metadata
        asked = asked_of(attn_fn, q)
        if isinstance(asked, str):
            _say(asked)
            self._write_held(forward_batch)
            return attend_in_turns(q, step.turns, step.meta.num_tokens, attn_fn)
        if step.new_kv is not None and step.new_kv.layer is not asked.layer:
            self._write_held(forward_batch)
        new, step.new_kv = step.new_kv, None
        rows = step.meta.rows
        arguments = asked.arguments()
        if new is None:
            # A layer without keys of its own, which attends to those of another.
            out = attend(with_rows(q, rows), asked.cache, step.meta, **arguments)
        else:
            k, v = with_rows(new.k, rows), with_rows(new.v, rows)
            group = engine.cp_group()
            out = cp_attention(with_rows(q, rows), k, v, step.meta, group=group, kv_cache=asked.cache, **arguments)
        return with_rows(out, len(q))

    def _write_held(self, forward_batch: Any) -> None:
        """Has the pool write what a layer has left to be written, as any attention but cpattn's own wants."""
        step: Step = forward_batch.attn_cp_metadata
        new, step.new_kv = step.new_kv, None
        if new is None:
            return
        meta = step.meta
        all_k, all_v = gather_kv(with_rows(new.k, meta.rows), with_rows(new.v, meta.rows), meta, group=engine.cp_group())
        assert all_v is not None
        k, v = (x.index_select(0, meta.restore_index) for x in (all_k, all_v))
        engine.set_kv(forward_batch, new.layer, k, v, new.swa_loc)


_SAID: set[str] = set()


def _say(reason: str) -> None:
    """Once for each reason, as a model has many layers."""
    if reason not in _SAID:
        _SAID.add(reason)
        engine.warn("SGLang's own kernel attends in the place of cpattn's, as %s", reason)
