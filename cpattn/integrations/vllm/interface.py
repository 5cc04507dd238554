"""What of vLLM the backend is built on, checked before anything is made of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from importlib import import_module
from typing import Any, NamedTuple

from cpattn.errors import UnsupportedError
from cpattn.integrations.vllm.batch import OTHER_ATTENTION

RELEASE = "0.33"
_BACKEND, _GROUPS = "vllm.v1.attention.backend", "vllm.distributed.parallel_state"

# The parameters that vLLM passes, in their order. A method with others may mean something else by them.
_PARAMETERS = {
    "AttentionImpl.__init__": "self num_heads head_size scale num_kv_heads alibi_slopes sliding_window kv_cache_dtype logits_soft_cap "
    "attn_type kv_sharing_target_layer_name",
    "AttentionImpl.forward": "self layer query key value kv_cache attn_metadata output output_scale output_block_scale",
    "AttentionMetadataBuilder.__init__": "self kv_cache_spec layer_names vllm_config device",
    "AttentionMetadataBuilder.build": "self common_prefix_len common_attn_metadata fast_build",
}
# What the classes have that is overridden or relied on: a name that is gone would be overridden to no effect.
_NAMES = {
    "AttentionBackend": "forward_includes_kv_cache_update supported_dtypes supported_kv_cache_dtypes get_name get_impl_cls get_builder_cls "
    "supports_sliding_window supports_sink supports_dcp supports_pcp supports_device_cpu_query_lens_mismatch",
    "AttentionImpl": "can_return_lse_for_decode supports_dcp supports_pcp",
    "AttentionMetadataBuilder": "get_cudagraph_support",
}
# A field by which vLLM asks for another attention than a causal one must be there as well: under a new name nobody would look at it, and
# causal attention would be the wrong answer.
_FIELDS = ("query_start_loc_cpu", "seq_lens_cpu_upper_bound", "num_reqs", "block_table_tensor", "causal", *OTHER_ATTENTION)


class Interface(NamedTuple):
    """Of vLLM: the classes that a backend derives from, and what says which ranks share a cache."""

    AttentionBackend: Any
    AttentionImpl: Any
    AttentionMetadataBuilder: Any
    get_dcp_group: Callable[[], Any]
    get_dcp_world_size_and_rank: Callable[[bool], tuple[int, int]]


def attention_interface() -> Interface:
    """Imports vLLM's attention interface.

    Raises:
        UnsupportedError: vLLM is not there, or its interface is another one than that of 0.33, with what differs.
    """
    classes = [_of(_BACKEND, name) for name in Interface._fields[:3]]
    named = dict(zip(Interface._fields, classes, strict=False))
    for method, parameters in _PARAMETERS.items():
        owner, name = method.split(".")
        found = getattr(named[owner], name, None)
        if not callable(found):
            raise _unknown(f"{owner} has no method {name}")
        _check(method, list(inspect.signature(found).parameters), parameters.split())
    for owner, names in _NAMES.items():
        missing = [name for name in names.split() if not hasattr(named[owner], name)]
        if missing:
            raise _unknown(f"{owner} has no {', '.join(missing)}")
    common = _of(_BACKEND, "CommonAttentionMetadata")
    known = {field.name for field in fields(common)} if is_dataclass(common) else set()
    missing = [name for name in _FIELDS if name not in known]
    if missing:
        raise _unknown(f"CommonAttentionMetadata has no {', '.join(missing)}")
    return Interface(*classes, *(_of(_GROUPS, name) for name in Interface._fields[3:]))


def _of(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _unknown(f"{module}.{name} cannot be imported ({type(error).__name__}: {error})") from error


def _check(method: str, found: list[str], known: list[str]) -> None:
    if found != known:
        raise _unknown(f"{method} takes ({', '.join(found)}) where ({', '.join(known)}) is known")


def _unknown(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"this vLLM has another attention interface than {RELEASE}, which cpattn.integrations.vllm is made for: {what}; install "
        f"vllm=={RELEASE}.*, or choose another attention backend"
    )
