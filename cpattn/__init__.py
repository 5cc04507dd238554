"""cpattn: exact causal attention over a context that is split across GPUs.

A name is imported when it is first asked for, so that ``import cpattn`` costs nothing, and works beside a broken torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpattn.api import cp_attention, explain, prepare, shard, unshard
    from cpattn.attention.backend import Backend
    from cpattn.attention.custom import custom_backend
    from cpattn.attention.latent_expansion import latent_expansion
    from cpattn.attention.ragged_rows import RaggedRows
    from cpattn.attention.registry import BACKENDS
    from cpattn.call.forward_context import ForwardContext, forward_context
    from cpattn.call.prepared import PreparedCall
    from cpattn.costs.estimate import Estimate, Estimates, estimate
    from cpattn.costs.known_machine import machine_for
    from cpattn.costs.links import measure_links
    from cpattn.errors import (
        BackendError,
        BatchError,
        CPError,
        DisagreementError,
        GroupError,
        HeadCountError,
        OptionError,
        PageTableError,
        PlanError,
        PoolFullError,
        PrefixError,
        RankError,
        RowCountError,
        TensorMismatchError,
        UnknownNameError,
        UnsupportedError,
    )
    from cpattn.exchange.hybrid import hybrid
    from cpattn.exchange.registry import STRATEGIES
    from cpattn.exchange.two_level import two_level
    from cpattn.expansion import ExpandFunction
    from cpattn.keys import Keys
    from cpattn.kv_cache import PackedKV, PagedKV
    from cpattn.machine import MACHINES, KernelCosts, LinkCosts, Machine
    from cpattn.metadata.batch import Request
    from cpattn.metadata.bucket import Bucket
    from cpattn.metadata.chunks import Chunks
    from cpattn.metadata.cp_metadata import CPMetadata
    from cpattn.metadata.plan import Chunk, Plan, build_metadata, plan, required_rows
    from cpattn.metadata.striped import Striped
    from cpattn.options import AttentionOptions
    from cpattn.pool.kv_pool import KVPool
    from cpattn.pool.relayout import relayout
    from cpattn.problem import Problem
    from cpattn.serving import attend, gather_kv, slot_mapping, write_kv
    from cpattn.spans import Spans
    from cpattn.transports.groups import check, release, transport
    from cpattn.transports.loopback import LoopbackGroup
    from cpattn.transports.process_group import ProcessGroupCommunicator
    from cpattn.transports.transport import Communicator, Transport
    from cpattn.version import __version__

__all__ = [
    "BACKENDS",
    "MACHINES",
    "STRATEGIES",
    "AttentionOptions",
    "Backend",
    "BackendError",
    "BatchError",
    "Bucket",
    "CPError",
    "CPMetadata",
    "Chunk",
    "Chunks",
    "Communicator",
    "DisagreementError",
    "Estimate",
    "Estimates",
    "ExpandFunction",
    "ForwardContext",
    "GroupError",
    "HeadCountError",
    "KVPool",
    "KernelCosts",
    "Keys",
    "LinkCosts",
    "LoopbackGroup",
    "Machine",
    "OptionError",
    "PackedKV",
    "PageTableError",
    "PagedKV",
    "Plan",
    "PlanError",
    "PoolFullError",
    "PrefixError",
    "PreparedCall",
    "Problem",
    "ProcessGroupCommunicator",
    "RaggedRows",
    "RankError",
    "Request",
    "RowCountError",
    "Spans",
    "Striped",
    "TensorMismatchError",
    "Transport",
    "UnknownNameError",
    "UnsupportedError",
    "__version__",
    "attend",
    "build_metadata",
    "check",
    "cp_attention",
    "custom_backend",
    "estimate",
    "explain",
    "forward_context",
    "gather_kv",
    "hybrid",
    "latent_expansion",
    "machine_for",
    "measure_links",
    "plan",
    "prepare",
    "relayout",
    "release",
    "required_rows",
    "shard",
    "slot_mapping",
    "transport",
    "two_level",
    "unshard",
    "write_kv",
]

# Where each name comes from: the imports above, for those who run this; a test compares the two.
_NAMES = {
    "api": "cp_attention explain prepare shard unshard",
    "attention.backend": "Backend",
    "attention.custom": "custom_backend",
    "attention.latent_expansion": "latent_expansion",
    "attention.ragged_rows": "RaggedRows",
    "attention.registry": "BACKENDS",
    "call.forward_context": "ForwardContext forward_context",
    "call.prepared": "PreparedCall",
    "costs.estimate": "Estimate Estimates estimate",
    "costs.known_machine": "machine_for",
    "costs.links": "measure_links",
    "machine": "MACHINES KernelCosts LinkCosts Machine",
    "errors": "BackendError BatchError CPError DisagreementError GroupError HeadCountError OptionError PageTableError PlanError "
    "PoolFullError PrefixError RankError RowCountError TensorMismatchError UnknownNameError UnsupportedError",
    "exchange.hybrid": "hybrid",
    "exchange.registry": "STRATEGIES",
    "exchange.two_level": "two_level",
    "expansion": "ExpandFunction",
    "keys": "Keys",
    "kv_cache": "PackedKV PagedKV",
    "pool.kv_pool": "KVPool",
    "pool.relayout": "relayout",
    "metadata.batch": "Request",
    "metadata.bucket": "Bucket",
    "metadata.chunks": "Chunks",
    "metadata.cp_metadata": "CPMetadata",
    "metadata.plan": "Chunk Plan build_metadata plan required_rows",
    "metadata.striped": "Striped",
    "options": "AttentionOptions",
    "problem": "Problem",
    "serving": "attend gather_kv slot_mapping write_kv",
    "spans": "Spans",
    "transports.groups": "check release transport",
    "transports.loopback": "LoopbackGroup",
    "transports.process_group": "ProcessGroupCommunicator",
    "transports.transport": "Communicator Transport",
    "version": "__version__",
}
_HOMES = {name: f"cpattn.{module}" for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is not None:
        value = globals()[name] = getattr(import_module(home), name)
        return value
    spec = None if name.startswith("_") else find_spec(f"cpattn.{name}")
    if spec is not None:
        if spec.submodule_search_locations is not None:
            # A folder, of which what the names above need is there as an attribute, as if all had been imported.
            for module in _NAMES:
                import_module(f"cpattn.{module}")
        return import_module(f"cpattn.{name}")
    # With these two Python says which name it might have been.
    raise AttributeError(f"module 'cpattn' has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    """What there is for a user: an interactive session offers it."""
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__, "integrations", "testing", "viz"})
