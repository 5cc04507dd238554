"""cpattn: exact causal attention over a context that is split across GPUs."""

from cpattn.cli.env import report_if_torch_is_broken

# `cpattn env` has to say what is broken, even if it is what all below needs.
report_if_torch_is_broken()

from cpattn.api import cp_attention, explain, shard, unshard
from cpattn.attention.custom import custom_backend
from cpattn.attention.registry import BACKENDS
from cpattn.attention.rows import RaggedRows
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
from cpattn.exchange.registry import STRATEGIES
from cpattn.kv_cache import PackedKV, PagedKV
from cpattn.kv_pool import KVPool
from cpattn.metadata.batch import Request
from cpattn.metadata.bucket import Bucket
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.plan import Chunk, Plan, build_metadata, plan, required_rows
from cpattn.serving import attend, gather_kv, slot_mapping, write_kv
from cpattn.transports.groups import release
from cpattn.transports.loopback import LoopbackGroup
from cpattn.transports.process_group import ProcessGroupCommunicator
from cpattn.transports.transport import Communicator, Transport
from cpattn.version import __version__

__all__ = [
    "BACKENDS",
    "STRATEGIES",
    "BackendError",
    "BatchError",
    "Bucket",
    "CPError",
    "CPMetadata",
    "Chunk",
    "Communicator",
    "DisagreementError",
    "GroupError",
    "HeadCountError",
    "KVPool",
    "LoopbackGroup",
    "OptionError",
    "PackedKV",
    "PageTableError",
    "PagedKV",
    "Plan",
    "PlanError",
    "PoolFullError",
    "PrefixError",
    "ProcessGroupCommunicator",
    "RaggedRows",
    "RankError",
    "Request",
    "RowCountError",
    "TensorMismatchError",
    "Transport",
    "UnknownNameError",
    "UnsupportedError",
    "__version__",
    "attend",
    "build_metadata",
    "cp_attention",
    "custom_backend",
    "explain",
    "gather_kv",
    "plan",
    "release",
    "required_rows",
    "shard",
    "slot_mapping",
    "unshard",
    "write_kv",
]
