"""Stand-ins for the builds of FlashAttention-3 that PyPI has: their operators' schemas and configurations, as recorded, over
plain attention on a CPU. They refuse what the real ones refuse, in their words, and read pages as they do."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from cpattn.attention import fa3_build
from cpattn.attention.backend import AttentionOptions
from cpattn.attention.reference import reference_attention
from cpattn.keys import Keys
from cpattn.spans import Spans

# Of fa3-fwd 0.0.3; tokenspeed-fa3 3.0.0.post20260810 has one argument more.
SCHEMA = (
    "fwd(Tensor q,Tensor k,Tensor v,Tensor(k_new!)? k_new = None,Tensor(v_new!)? v_new = None,Tensor? q_v = None,Tensor(out!)? out = None,"
    "Tensor? cu_seqlens_q = None,Tensor? cu_seqlens_k = None,Tensor? cu_seqlens_k_new = None,Tensor? seqused_q = None,"
    "Tensor? seqused_k = None,int? max_seqlen_q = None,int? max_seqlen_k = None,Tensor? page_table = None,Tensor? kv_batch_idx = None,"
    "Tensor? leftpad_k = None,Tensor? rotary_cos = None,Tensor? rotary_sin = None,Tensor? seqlens_rotary = None,Tensor? q_descale = None,"
    "Tensor? k_descale = None,Tensor? v_descale = None,float? softmax_scale = None,bool is_causal = False,int window_size_left = -1,"
    "int window_size_right = -1,int attention_chunk = 0,float softcap = 0.0,bool is_rotary_interleaved = False,"
    "Tensor? scheduler_metadata = None,int num_splits = 0,bool? pack_gqa = None,int sm_margin = 0{more}) "
    "-> (Tensor(out!), Tensor, Tensor, Tensor)"
)
FORWARD_LACKS = "BACKWARD PAGEDKV LOCAL FP16"
FULL_LACKS = "BACKWARD SOFTCAP HDIM96 SM8x HDIMDIFF64 HDIMDIFF192"
_FLAGS = "BACKWARD SPLIT PAGEDKV APPENDKV LOCAL SOFTCAP PACKGQA FP16 FP8 VARLEN CLUSTER HDIM64 HDIM96 HDIM128 HDIM192 HDIM256 SM8x"


def recorded_config(lacks: str) -> dict[str, Any]:
    """As the builds have it, with the two spellings of the prefix."""
    flags = {f"FLASHATTENTION_DISABLE_{name}": name in lacks.split() for name in _FLAGS.split()}
    flags["FLASHATTENTION_ENABLE_VCOLMAJOR"] = False
    return {"build_flags": flags | {f"FLASH_ATTENTION_DISABLE_{name}": name in lacks.split() for name in ("HDIMDIFF64", "HDIMDIFF192")}}


@dataclass
class FakeBuild:
    """One of them; ``calls`` has the arguments of each launch."""

    name: str
    lacks: str
    more: str = ""
    has_config: bool = True
    calls: list[dict[str, Any]] = field(default_factory=list)

    def forward(self, **given: Any) -> tuple[Tensor, Tensor]:
        """What the kernel does, or raises."""
        self.calls.append(given)
        q, k, v = given["q"], given["k"], given["v"]
        table, left = given["page_table"], given["window_size_left"]
        missing = self.lacks.split()
        for feature, needed, words in (
            ("FP16", q.dtype == torch.float16, "FP16"),
            ("FP8", q.dtype == torch.float8_e4m3fn, "FP8"),
            ("LOCAL", left >= 0, "local attention"),
            ("SOFTCAP", given["softcap"] > 0, "tanh softcapping"),
            ("PAGEDKV", table is not None, "paged KV"),
            ("SPLIT", given["num_splits"] > 1, "splits"),
            ("PACKGQA", bool(given["pack_gqa"]), "pack_gqa"),
        ):
            if needed and feature in missing:
                raise RuntimeError(f"This flash attention build does not support {words}.")
        if table is not None:
            assert given["cu_seqlens_k"] is None
            assert table.dtype == torch.int32
            assert table.stride(-1) == 1
        q_len, k_len = given["cu_seqlens_q"].diff().numpy(), given["seqused_k"].numpy()
        k_start = 0 * k_len if table is not None else given["cu_seqlens_k"][:-1].numpy()
        diagonal = k_len - q_len + 1 if given["is_causal"] else k_len
        request = None if table is None else given["kv_batch_idx"].numpy()
        spans = Spans.build(q_len, k_start, k_len, diagonal, request=request)
        if q.dtype == torch.float8_e4m3fn:
            q, k, v = q.bfloat16(), self._dequantised(k, given["k_descale"], spans), self._dequantised(v, given["v_descale"], spans)
        assert k.dtype == v.dtype == q.dtype
        options = AttentionOptions(given["softmax_scale"], None if left < 0 else left + 1, given["softcap"] or None)
        out, lse = reference_attention(q, Keys(k, v, table), spans, options, q.dtype)
        if given.get("out") is not None:
            out = given["out"].copy_(out)
        group = q.shape[1] // k.shape[-2]
        loads_tiles = table is not None and given["leftpad_k"] is None and k.shape[1] % 128 == 0 and given["max_seqlen_q"] * group > 128
        if loads_tiles and v.isnan().any():
            out = out * torch.nan
        return out, lse.T.contiguous()

    def _dequantised(self, x: Tensor, descale: Tensor | None, spans: Spans) -> Tensor:
        """Of each sequence and head; the calls here have the same for all sequences."""
        if descale is None:
            return x.bfloat16()
        assert descale.dtype == torch.float32
        assert descale.shape == (len(spans), x.shape[-2])
        assert (descale == descale[:1]).all()
        return (x.float() * descale[0, :, None]).bfloat16()

    def functions(self) -> dict[str, Callable[..., Any]]:
        """The package's own functions, by their recorded signatures."""

        def flash_attn_varlen_func(
            q: Any, k: Any, v: Any, cu_seqlens_q: Any, cu_seqlens_k: Any, max_seqlen_q: Any, max_seqlen_k: Any, seqused_q: Any = None,
            seqused_k: Any = None, softmax_scale: Any = None, causal: Any = False, qv: Any = None, q_descale: Any = None,
            k_descale: Any = None, v_descale: Any = None, window_size: Any = (-1, -1), attention_chunk: Any = 0, softcap: Any = 0.0,
            num_splits: Any = 1, pack_gqa: Any = None, deterministic: Any = False, sm_margin: Any = 0, return_attn_probs: Any = False,
        ) -> Any:  # fmt: skip
            out, lse = self.forward(
                q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k, max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k, page_table=None, kv_batch_idx=None, leftpad_k=None, k_descale=k_descale,
                v_descale=v_descale, softmax_scale=softmax_scale,
                is_causal=causal, window_size_left=window_size[0], window_size_right=window_size[1], softcap=softcap,
                num_splits=num_splits, pack_gqa=pack_gqa,
            )  # fmt: skip
            return (out, lse) if return_attn_probs else out

        def flash_attn_with_kvcache(
            q: Any, k_cache: Any, v_cache: Any, k: Any = None, v: Any = None, qv: Any = None, rotary_cos: Any = None,
            rotary_sin: Any = None, cache_seqlens: Any = None, cache_batch_idx: Any = None, cache_leftpad: Any = None,
            page_table: Any = None, cu_seqlens_q: Any = None, cu_seqlens_k_new: Any = None, max_seqlen_q: Any = None,
            rotary_seqlens: Any = None, q_descale: Any = None, k_descale: Any = None, v_descale: Any = None, softmax_scale: Any = None,
            causal: Any = False, window_size: Any = (-1, -1), attention_chunk: Any = 0, softcap: Any = 0.0,
            rotary_interleaved: Any = True, scheduler_metadata: Any = None, num_splits: Any = 0, pack_gqa: Any = None,
            sm_margin: Any = 0, return_softmax_lse: Any = False,
        ) -> Any:  # fmt: skip
            out, lse = self.forward(
                q=q, k=k_cache, v=v_cache, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=None, seqused_k=cache_seqlens,
                max_seqlen_q=max_seqlen_q, max_seqlen_k=None, page_table=page_table, kv_batch_idx=cache_batch_idx,
                leftpad_k=cache_leftpad, k_descale=k_descale, v_descale=v_descale,
                softmax_scale=softmax_scale, is_causal=causal, window_size_left=window_size[0],
                window_size_right=window_size[1], softcap=softcap, num_splits=num_splits, pack_gqa=pack_gqa,
            )  # fmt: skip
            return (out, lse, None, None) if return_softmax_lse else out

        return {"flash_attn_varlen_func": flash_attn_varlen_func, "flash_attn_with_kvcache": flash_attn_with_kvcache}


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, fake: FakeBuild, namespace: str, schema: str | None) -> Iterator[FakeBuild]:
    """The build in place of whichever this machine has; without a schema it has no operator.

    Args:
        namespace: of the operator; one that no other test uses, since torch keeps what it has once looked up.
    """
    names = fa3_build.Names(f"{fake.name}_interface", f"{fake.name}_config", namespace)
    library: Any = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
    if schema is not None:
        order = [argument.strip().split(" = ")[0].split(" ")[-1] for argument in schema[4 : schema.index(") ->")].split(",")]
        defaults = {"num_splits": 0, "softcap": 0.0, "is_causal": False, "window_size_left": -1, "window_size_right": -1}

        def fwd(*args: Any, **kwargs: Any) -> Any:
            given = dict.fromkeys(order) | defaults | dict(zip(order, args, strict=False)) | kwargs
            out, lse = fake.forward(**given)
            return out, lse, out.new_empty(0), out.new_empty(0)

        library.define(schema)
        library.impl("fwd", fwd, "CPU")
    interface, config = ModuleType(names.interface), ModuleType(names.config)
    for name, function in fake.functions().items():
        function.__module__ = names.interface
        setattr(interface, name, function)
    if fake.has_config:
        config.CONFIG = recorded_config(fake.lacks)  # type: ignore[attr-defined]
    for module in (interface, config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(fa3_build, "NAMES", (names,))
    fa3_build._find_build.cache_clear()
    fa3_build._tried.cache_clear()
    try:
        yield fake
    finally:
        fa3_build._find_build.cache_clear()
        fa3_build._tried.cache_clear()
        library._destroy()
