"""The attention backend that vLLM's ``CUSTOM`` stands for. vLLM is imported when the class is asked for.

What vLLM 0.33 gives a backend for grouped-query attention is the step as each rank of tensor parallelism has it: the queries of its
heads for all new tokens, and a cache of its KV heads. Under decode context parallelism ranks with the same KV heads hold every
n-th of the tokens each. cpattn calls that ``queries="all"`` and ``Striped(interleave)``, and one :func:`cpattn.attend` computes it,
prefills and decodes alike. Without it the same call is one of a single rank.

What vLLM does not do for grouped-query attention is to split the rows of a prefill over ranks: its prefill context parallelism refuses
all models but those with MLA before a backend is asked. So this one does not claim to support it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpattn.errors import UnsupportedError
from cpattn.integrations.vllm.batch import plan_of
from cpattn.integrations.vllm.interface import attention_interface
from cpattn.integrations.vllm.pages import FP8, pages_of
from cpattn.kv_cache import PagedKV
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.serving import attend, write_kv
from cpattn.transports.groups import Group

NAME = "CPAttentionBackend"
_CACHES = ("auto", "bfloat16", "float16", *FP8)


class StepMetadata(NamedTuple):
    """What layers are handed as their ``attn_metadata``.

    Attributes:
        meta: of this rank.
        block_table: int32 ``[>= num_requests, max_blocks]``.
        group: the ranks that share the cache's tokens; None where each has all.
    """

    meta: CPMetadata
    block_table: Tensor
    group: Group


def __getattr__(name: str) -> Any:
    """vLLM imports the class by its name. Raises UnsupportedError where its interface is not known."""
    if name == NAME:
        return attention_backend()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def attention_backend() -> Any:
    """The class, derived from those of the vLLM that is installed. Raises UnsupportedError if that is another than is known."""
    vllm = attention_interface()
    builder, implementation = _builder(vllm), _implementation(vllm)

    class CPAttentionBackend(vllm.AttentionBackend):  # type: ignore[name-defined, misc]
        """cpattn as vLLM's ``CUSTOM``: decoders with grouped-query attention, their windows, softcap and sinks, with caches in half
        precision or float32 under decode context parallelism, and without it also in fp8."""

        # vLLM has the slots of new tokens already, so that they are written by those.
        forward_includes_kv_cache_update = False
        supported_dtypes = (torch.bfloat16, torch.float16, torch.float32)
        supported_kv_cache_dtypes = _CACHES

        @staticmethod
        def get_name() -> str:
            return "CUSTOM"

        @staticmethod
        def get_impl_cls() -> Any:
            return implementation

        @staticmethod
        def get_builder_cls() -> Any:
            return builder

        @classmethod
        def supports_sliding_window(cls) -> bool:
            return True

        @classmethod
        def supports_sink(cls) -> bool:
            return True

        @classmethod
        def supports_device_cpu_query_lens_mismatch(cls) -> bool:
            """Plans are made from the lengths on the host."""
            return False

    CPAttentionBackend.__qualname__ = NAME  # by which vLLM finds it
    return CPAttentionBackend


def _builder(vllm: Any) -> Any:
    class CPMetadataBuilder(vllm.AttentionMetadataBuilder):  # type: ignore[misc]
        """Makes the plan of each step. No graph holds attention: plans differ from step to step, and vLLM captures the rest of a
        layer."""

        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            if vllm_config.speculative_config is not None:
                raise UnsupportedError(
                    "speculative decoding is on, under which vLLM knows on the host only a bound of the lengths that a plan needs; "
                    "leave it off, or choose another attention backend"
                )
            self.size, self.rank = vllm.get_dcp_world_size_and_rank(kv_cache_spec.dcp_sharded)
            self.interleave = vllm_config.parallel_config.cp_kv_cache_interleave_size
            self.group = vllm.get_dcp_group().device_group if self.size > 1 else None

        def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StepMetadata:
            plan = plan_of(common_attn_metadata, self.size, self.interleave)
            return StepMetadata(plan.metadata(self.rank, self.device), common_attn_metadata.block_table_tensor, self.group)

    return CPMetadataBuilder


def _implementation(vllm: Any) -> Any:
    class CPAttentionImpl(vllm.AttentionImpl):  # type: ignore[misc]
        """Attention of one layer. vLLM calls ``do_kv_cache_update`` with the slots that it has given the new tokens, then ``forward``,
        which writes nothing."""

        # vLLM asks for both under decode context parallelism. The LSE stays in here: cpattn merges the ranks' results itself.
        can_return_lse_for_decode = True
        supports_dcp = True
        supports_pcp = False

        def __init__(
            self,
            num_heads: int,
            head_size: int,
            scale: float,
            num_kv_heads: int | None = None,
            alibi_slopes: list[float] | None = None,
            sliding_window: int | None = None,
            kv_cache_dtype: str = "auto",
            logits_soft_cap: float | None = None,
            attn_type: str = "decoder",
            kv_sharing_target_layer_name: str | None = None,
            **others: Any,
        ) -> None:
            sinks: Tensor | None = others.pop("sinks", None)
            refused = {
                f"attn_type={attn_type!r}": attn_type != "decoder",
                f"kv_cache_dtype={kv_cache_dtype!r}": kv_cache_dtype not in _CACHES,
                f"kv_cache_dtype={kv_cache_dtype!r} under decode context parallelism": kv_cache_dtype in FP8
                and vllm.get_dcp_world_size_and_rank(True)[0] > 1,
                "alibi_slopes": alibi_slopes is not None,
                **{f"{name}={value!r}": True for name, value in others.items() if value},
            }
            for what, is_refused in refused.items():
                if is_refused:
                    raise UnsupportedError(f"a layer asks for {what}, which cpattn does not have here; choose another attention backend")
            self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads or num_heads
            self.scale, self.kv_cache_dtype = float(scale), kv_cache_dtype
            self.window, self.softcap, self.sinks = sliding_window or None, logits_soft_cap or None, sinks
            # vLLM's writers of a cache that layers share ask for it.
            self.attn_type, self.kv_sharing_target_layer_name = attn_type, kv_sharing_target_layer_name
            self._written: tuple[Tensor, PagedKV] | None = None

        def forward(
            self,
            layer: Any,
            query: Tensor,
            key: Tensor,
            value: Tensor,
            kv_cache: Tensor,
            attn_metadata: StepMetadata | None,
            output: Tensor,
            output_scale: Tensor | None = None,
            output_block_scale: Tensor | None = None,
        ) -> Tensor:
            """Attention of a step. A collective call of the ranks that share the cache.

            Args:
                query: ``[num_tokens, num_heads, head_size]``, padding at the end; key and value are in the cache already.
                kv_cache: ``[num_blocks, num_kv_heads, block_size, 2 * head_size]``.
                attn_metadata: None in the run by which vLLM measures memory.
                output: ``[num_tokens, num_heads, head_size]``, written to; rows of padding are left as they are.
            """
            if output_scale is not None or output_block_scale is not None:
                raise UnsupportedError("vLLM asks for a quantized output, which cpattn does not write; leave the fusion of it off")
            if attn_metadata is None:
                return output.fill_(0)
            meta, block_table, group = attn_metadata
            rows = meta.rows
            if rows:
                attend(
                    query[:rows],
                    self._pages(layer, kv_cache, block_table),
                    meta,
                    group=group,
                    scale=self.scale,
                    window=self.window,
                    softcap=self.softcap,
                    sinks=self.sinks,
                    out=output[:rows],
                )
            return output

        def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
            """Writes row i of key and value into slot ``slot_mapping[i]``; -1 for what is padding, or another rank's."""
            if not kv_cache.numel():
                return
            if self._written is None or self._written[0] is not kv_cache:
                # Made once for a layer: where slots are given, the block table of a step does not matter.
                no_table = torch.empty(0, 0, dtype=torch.int32, device=kv_cache.device)
                self._written = kv_cache, self._pages(layer, kv_cache, no_table)
            rows = len(slot_mapping)  # which may be without the padding
            write_kv(key[:rows], value[:rows], self._written[1], slot_mapping)

        def _pages(self, layer: Any, kv_cache: Tensor, block_table: Tensor) -> PagedKV:
            if self.kv_cache_dtype not in FP8:
                return pages_of(kv_cache, self.head_size, block_table)
            scales = {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
            return pages_of(kv_cache, self.head_size, block_table, kv_cache_dtype=self.kv_cache_dtype, **scales)

    return CPAttentionImpl
