"""For testing an engine built on cpattn: the oracle, derived tolerances, running N ranks on one machine, checking a kernel
or a layout. Hypothesis strategies are in :mod:`cpattn.testing.strategies`, which needs ``cpattn[testing]``."""

from cpattn.testing.batches import NAMED_BATCHES
from cpattn.testing.check_backend import BackendReport, check_backend
from cpattn.testing.check_layout import LayoutError, check_layout
from cpattn.testing.oracle import oracle_attention
from cpattn.testing.ranks import ProcessRanks, RankFailure, run_loopback
from cpattn.testing.solo import SoloCommunicator
from cpattn.testing.tolerance import relative_rmse, rmse, rmse_bound, single_device_bound

__all__ = [
    "NAMED_BATCHES",
    "BackendReport",
    "LayoutError",
    "ProcessRanks",
    "RankFailure",
    "SoloCommunicator",
    "check_backend",
    "check_layout",
    "oracle_attention",
    "relative_rmse",
    "rmse",
    "rmse_bound",
    "run_loopback",
    "single_device_bound",
]
