"""Runs examples as their commands do, in processes that have imported torch: a new one takes two seconds of a core for that."""

from __future__ import annotations

import io
import os
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from cpattn.testing import ProcessRanks

EXAMPLES = Path(__file__).parents[2] / "examples"


def alone(example: str, *arguments: str) -> Any:
    """Runs it in this process, as without torchrun, and returns what it exits with."""
    path = EXAMPLES / f"{example}.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path.name, *arguments])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(path), run_name="__main__")
    return exited.value.code


def together(example: str, processes: int) -> list[tuple[Any, str]]:
    """Runs it in so many, as torchrun does, and returns what each exits with and prints."""
    # The ranks' store, as torchrun has one: they look for no free port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ProcessRanks(processes) as ranks:
        return ranks.run(_as_launched, example, store.port)


def _as_launched(example: str, port: int) -> tuple[Any, str]:
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    # The example makes its own.
    dist.destroy_process_group()
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    with redirect_stdout(io.StringIO()) as printed:
        exited = alone(example)
    return exited, printed.getvalue()
