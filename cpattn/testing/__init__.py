"""For testing an engine built on cpattn: the oracle, derived tolerances, running N ranks on one machine, checking a kernel."""

from cpattn.testing.check_backend import BackendReport, check_backend
from cpattn.testing.oracle import oracle_attention
from cpattn.testing.ranks import ProcessRanks, RankFailure, run_loopback
from cpattn.testing.solo import SoloCommunicator
from cpattn.testing.tolerance import relative_rmse, rmse, rmse_bound, single_device_bound

__all__ = [
    "BackendReport",
    "ProcessRanks",
    "RankFailure",
    "SoloCommunicator",
    "check_backend",
    "oracle_attention",
    "relative_rmse",
    "rmse",
    "rmse_bound",
    "run_loopback",
    "single_device_bound",
]
