"""What the plugin takes SGLang's classes to be. A release in which they are otherwise is refused: a call might mean something else."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

from cpattn.errors import UnsupportedError
from cpattn.integrations.sglang.step import TWO_BLOCKS
from cpattn.version import __version__

KNOWN_RELEASE = "0.5.23"
"""The release of SGLang that is known: in it all of this was read, and against it `make test-engines` runs."""

# Everything public of SGLang's ZigzagCPStrategy: of a method, what it takes. What is new there would run on metadata that are not SGLang's.
STRATEGY: dict[str, str | None] = {
    "all_gather_dsa_trtllm_fp8_kv": "forward_batch k k_rope",
    "build_metadata": "num_tokens seqs_len extend_seqs_len",
    "can_apply": "num_tokens forward_batch",
    "cp_rank": None,
    "gather_hidden_states": "x forward_batch stream",
    "gather_kv_cache": "x forward_batch stream",
    "get_supported_attention_backend": "",
    "kind": None,
    "local_q_indices": "num_tokens forward_batch",
    "materialize_full_indexer_k_cache": "key forward_batch",
    "materialize_full_kv": "forward_batch layer k v swa_loc",
    "materialize_full_mla_kv": "forward_batch layer k_nope k_rope",
    "moe_num_token_non_padded": "forward_batch",
    "name": None,
    "per_layer_attn_cp_comm": None,
    "reindex_attn_metadata": "core_attn_metadata",
    "run_attention": "q forward_batch device attn_fn attention_backend",
    "shard_hidden_states": "x forward_batch",
    "shard_local_tokens": "input_",
    "shard_per_request": "extend_seqs_cpu extend_seqs",
    "shard_position_ids": "positions forward_batch",
    "split_before_forward": "forward_batch input_ids positions input_embeds",
}
# The fields of its metadata that others read or write; those of two blocks are refused when they are read.
FIELDS = TWO_BLOCKS | {"bs", "max_rank_len", "per_rank_actual_token", "per_rank_logical_token", "total_seq_lens"}
# What the plugin calls.
CALLS = {
    "KVWriteLoc.for_batch": "forward_batch swa_loc full_loc",
    "KVWriteLoc.for_layer": "forward_batch layer swa_loc full_loc",
    "MHATokenToKVPool.set_kv_buffer": "layer loc_info cache_k cache_v k_scale v_scale layer_id_override dcp_kv_mask",
    "MLATokenToKVPool.set_mla_kv_buffer": "layer loc_info cache_k_nope cache_k_rope layer_id_override",
}


# The modules that have what else the plugin takes.
_NAMES = {"runtime_context": "attention_backends", "hook_registry": "HookRegistry HookType"}


class Modules(NamedTuple):
    """Of SGLang, those that the plugin is built on."""

    zigzag: Any
    memory_pool: Any
    runtime_context: Any
    hook_registry: Any


def checked_interface(release: str) -> Modules:
    """Imports what is built on, and compares it with what is known of it.

    Args:
        release: SGLang's version, for the message.

    Raises:
        UnsupportedError: as :func:`check_interface`; and where a module is not there.
    """
    names = ("layers.cp.zigzag", "mem_cache.memory_pool", "runtime_context", "plugins.hook_registry")
    try:
        modules = Modules(*(import_module(f"sglang.srt.{name}") for name in names))
    except ImportError as error:
        raise _unknown(release, f"a module cannot be imported ({type(error).__name__}: {error})") from error
    check_interface(modules, release)
    return modules


def check_interface(modules: Modules, release: str) -> None:
    """Compares SGLang with what is known of it.

    Args:
        release: its version, for the message.

    Raises:
        UnsupportedError: in one line, with the first thing that is otherwise.
    """
    difference = next(_differences(modules), None)
    if difference is not None:
        raise _unknown(release, difference)


def _unknown(release: str, difference: str) -> UnsupportedError:
    return UnsupportedError(
        f"cpattn {__version__} knows the context parallelism of SGLang {KNOWN_RELEASE}, but in this one ({release}) {difference}: "
        "SGLang's own strategy stays in its place; install a cpattn that knows this release, or that SGLang"
    )


def _differences(modules: Modules) -> Iterator[str]:
    strategy = getattr(modules.zigzag, "ZigzagCPStrategy", None)
    if strategy is None:
        yield "there is no ZigzagCPStrategy"
        return
    found = {name: _taken(inspect.getattr_static(strategy, name)) for name in dir(strategy) if not name.startswith("_")}
    yield from _compared("ZigzagCPStrategy", STRATEGY, found)
    metadata = getattr(modules.zigzag, "ZigzagContextParallelMetadata", None)
    if not dataclasses.is_dataclass(metadata):
        yield "there is no dataclass ZigzagContextParallelMetadata"
        return
    fields = {field.name for field in dataclasses.fields(metadata)}
    for name in sorted(FIELDS ^ fields):
        yield f"ZigzagContextParallelMetadata has {'the field' if name in fields else 'no field'} {name}"
    for path, taken in CALLS.items():
        owner, name = path.split(".")
        cls = getattr(modules.memory_pool, owner, None)
        if cls is None:
            yield f"there is no {owner}"
            return
        method = inspect.getattr_static(cls, name, None)
        yield from _compared(owner, {name: taken}, {} if method is None else {name: _taken(method)})
    for module, names in _NAMES.items():
        for name in names.split():
            if not hasattr(getattr(modules, module), name):
                yield f"there is no {name}"


def _compared(owner: str, known: dict[str, str | None], found: dict[str, str | None]) -> Iterator[str]:
    for name in sorted(known.keys() | found.keys()):
        if name not in found:
            yield f"{owner} has no {name}"
        elif name not in known:
            yield f"{owner} has {name}, which is new"
        elif known[name] != found[name]:
            yield f"{owner}.{name} takes ({found[name]}), not ({known[name]})"


def _taken(attribute: Any) -> str | None:
    """What a method takes beside its instance or class; None of what is no method."""
    if isinstance(attribute, (classmethod, staticmethod)):
        attribute = attribute.__func__
    if not inspect.isfunction(attribute):
        return None
    return " ".join(list(inspect.signature(attribute).parameters)[1:])
