"""Which GPU a worker of pytest-xdist has first."""

from __future__ import annotations


def rotated(visible: str, worker: str) -> str:
    """The value of CUDA_VISIBLE_DEVICES, begun at another place for each worker; all GPUs are still there.

    >>> rotated("0,1,2", "gw4")
    '1,2,0'
    """
    gpus = visible.split(",")
    first = int(worker.removeprefix("gw")) % len(gpus)
    return ",".join(gpus[first:] + gpus[:first])
