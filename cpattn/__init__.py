"""cpattn: exact causal attention over a context that is split across GPUs."""

from cpattn.api import cp_attention, explain, shard, unshard
from cpattn.attention.registry import BACKENDS
from cpattn.attention.rows import RaggedRows
from cpattn.errors import (
    BatchError,
    CPError,
    DisagreementError,
    GroupError,
    HeadCountError,
    OptionError,
    PlanError,
    PrefixError,
    RankError,
    RowCountError,
    TensorMismatchError,
    UnknownNameError,
    UnsupportedError,
)
from cpattn.exchange.communicator import Communicator, LoopbackGroup, ProcessGroupCommunicator
from cpattn.exchange.registry import STRATEGIES
from cpattn.kv_cache import PackedKV
from cpattn.metadata.batch import Request
from cpattn.metadata.cp_metadata import CPMetadata
from cpattn.metadata.plan import Chunk, Plan, build_metadata, plan
from cpattn.version import __version__

__all__ = [
    "BACKENDS",
    "STRATEGIES",
    "BatchError",
    "CPError",
    "CPMetadata",
    "Chunk",
    "Communicator",
    "DisagreementError",
    "GroupError",
    "HeadCountError",
    "LoopbackGroup",
    "OptionError",
    "PackedKV",
    "Plan",
    "PlanError",
    "PrefixError",
    "ProcessGroupCommunicator",
    "RaggedRows",
    "RankError",
    "Request",
    "RowCountError",
    "TensorMismatchError",
    "UnknownNameError",
    "UnsupportedError",
    "__version__",
    "build_metadata",
    "cp_attention",
    "explain",
    "plan",
    "shard",
    "unshard",
]
