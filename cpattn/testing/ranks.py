"""Running N ranks on one machine: as threads over a loopback group, or as real processes over gloo."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from multiprocessing import get_context, get_start_method
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cpattn.errors import GroupError, UnknownNameError, shown
from cpattn.metadata.batch import is_integer
from cpattn.transports.loopback import LoopbackGroup
from cpattn.transports.transport import Transport

T = TypeVar("T")


class RankFailure(RuntimeError):
    """A rank raised or died; the message holds the traceback of each that did."""


def run_loopback(program: Callable[[Transport], T], size: int, timeout: float = 60.0) -> list[T]:
    """Runs ``program(transport)`` for every rank, a thread each, and returns the results in the order of ranks.

    >>> run_loopback(lambda transport: transport.rank, size=3)
    [0, 1, 2]

    The threads have the caller's grad mode, inference mode, autocast, CUDA device and stream.

    Args:
        program: of one rank.
        size: number of ranks.
        timeout: seconds that a rank may wait for another in a collective. The last one may return twice as much later than
            the first one. Where none ever returns, nothing ends it.

    Raises what the first rank to fail raised, and the others are made to stop waiting; TimeoutError where a rank is stuck.
    """
    group = LoopbackGroup(size, timeout)
    results: dict[int, T] = {}
    failures: list[BaseException] = []
    first_has_ended = threading.Event()
    modes = _ThreadModes()

    def run(rank: int) -> None:
        try:
            with modes.entered():
                results[rank] = program(group.transport(rank))
        except BaseException as failure:
            failures.append(failure)
            group.abort()
        first_has_ended.set()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    if threads:
        first_has_ended.wait()
    deadline = time.monotonic() + 2 * timeout
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if failures:
        raise failures[0]
    stuck = [rank for rank in range(size) if rank not in results]
    if stuck:
        group.abort()
        raise TimeoutError(f"{_named(stuck)} had not returned {2 * timeout:g} s after the first rank did; is there a loop without an end?")
    return [results[rank] for rank in range(size)]


class _ThreadModes:
    """What torch keeps for each thread, as it is here: a new thread begins without it."""

    def __init__(self) -> None:
        self._inference = torch.is_inference_mode_enabled()
        self._grad = torch.is_grad_enabled()
        self._cache = torch.is_autocast_cache_enabled()
        self._autocast = {kind: torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)}
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    @contextmanager
    def entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._inference:
                stack.enter_context(torch.inference_mode())
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype in self._autocast.items():
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self._cache))
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            yield


def _named(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


class ProcessRanks:
    """``size`` processes, joined in a process group as the default group, that run what they are given until closed.

    Starting them takes seconds, so keep one for many runs::

        with ProcessRanks(4) as ranks:
            results = ranks.run(program, arguments)

    The processes are spawned, so a script must guard its own start with ``if __name__ == "__main__":``. A program that calls
    ``multiprocessing.set_start_method("forkserver")`` gets them from a server, which may have torch imported (see
    ``multiprocessing.set_forkserver_preload``): they then start at once, with the environment that it began with.

    Args:
        size: number of processes.
        timeout: seconds that a rank may wait for another in a collective.
        patience: seconds that the last rank may return later than the first one, or be killed; twice the timeout if None.
        threads: torch threads in each process.
        transport: of the group, ``"gloo"`` or ``"nccl"``. NCCL wants a GPU for each rank; on a machine with fewer, ranks
            share them, each posing as another host (``NCCL_HOSTID``), which is for tests: transfers are then slow.

    Raises:
        GroupError: there is no such number of processes, or no GPU for NCCL.
        UnknownNameError: there is no transport of that name.
    """

    def __init__(self, size: int, timeout: float = 60.0, threads: int = 1, transport: str = "gloo", patience: float | None = None) -> None:
        _check_group(size, transport)
        self.size = size
        self._patience = 2 * timeout if patience is None else patience
        # A fork of this process would have neither its threads nor its GPU.
        is_served = get_start_method(allow_none=True) == "forkserver"
        context = get_context("forkserver") if is_served else get_context("spawn")
        self._directory = tempfile.TemporaryDirectory(prefix="cpattn-ranks-")
        store = str(Path(self._directory.name) / "store")
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, store, timeout, threads, transport, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, program: Callable[..., T], *arguments: Any) -> list[T]:
        """Runs ``program(*arguments)`` on every rank and returns the results in the order of ranks.

        The program is a function of an importable module; arguments and results are pickled. Raises RankFailure.
        """
        outcomes = self.outcomes(program, *arguments)
        failures = [f"rank {rank}: {value}" for rank, (done, value) in enumerate(outcomes) if not done]
        if failures:
            raise RankFailure("\n".join(failures))
        return [value for _, value in outcomes]

    def outcomes(self, program: Callable[..., Any], *arguments: Any) -> list[tuple[bool, Any]]:
        """As :meth:`run`, but for each rank (True, result) or (False, traceback as text); never raises for a rank."""
        task = pickle.dumps((program, arguments))
        for pipe in self._pipes:
            _send(pipe, task)
        # The end of a run is a wait for the others, too.
        deadline: float | None = None
        waiting = set(range(self.size))
        while waiting:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = wait([end for rank in waiting for end in (self._pipes[rank], self._processes[rank].sentinel)], left)
            waiting -= {rank for rank in waiting if self._pipes[rank] in ready or self._processes[rank].sentinel in ready}
            if deadline is None:
                deadline = time.monotonic() + self._patience
            elif not ready:
                break
        for rank in waiting:
            self._processes[rank].kill()
        return [self._outcome(rank, rank in waiting) for rank in range(self.size)]

    def _outcome(self, rank: int, was_killed: bool) -> tuple[bool, Any]:
        pipe, process = self._pipes[rank], self._processes[rank]
        try:
            if was_killed:
                process.join()
                return False, f"the rank had not returned {self._patience:g} s after the first one did; its process was killed"
            outcome: tuple[bool, Any] = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            process.join()
            return False, f"the process died with exit code {process.exitcode}"
        return outcome

    def close(self) -> None:
        """Ends the processes."""
        for pipe in self._pipes:
            _send(pipe, pickle.dumps(None))
        for process in self._processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
        self._directory.cleanup()

    def __enter__(self) -> ProcessRanks:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _check_group(size: Any, transport: Any) -> None:
    """What is wrong is refused here, and not in every process."""
    if not is_integer(size) or size < 1:
        raise GroupError(f"size={shown(size)}; pass the number of processes, an integer of at least 1")
    if transport not in ("gloo", "nccl"):
        raise UnknownNameError(f"transport={shown(transport)} is unknown; choose one of 'gloo', 'nccl'")
    if transport == "nccl" and not torch.cuda.device_count():
        raise GroupError("transport='nccl' is for GPUs, and torch finds none here; pass 'gloo'")


def _send(pipe: Connection, message: bytes) -> None:
    """Sends to a process that may be dead; whoever waits for its answer will find that out."""
    try:
        pipe.send_bytes(message)
    except OSError:
        pass


def _serve(rank: int, size: int, store: str, timeout: float, threads: int, transport: str, pipe: Connection) -> None:
    # The ranks are on one machine, whose own name may resolve to nothing.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(threads)
    if transport == "nccl":
        if torch.cuda.device_count() < size:
            os.environ |= {"NCCL_HOSTID": str(rank), "NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
        torch.cuda.set_device(rank % torch.cuda.device_count())
    try:
        dist.init_process_group(transport, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        while (task := pickle.loads(pipe.recv_bytes())) is not None:
            program, arguments = task
            try:
                outcome = True, program(*arguments)
            except Exception:
                outcome = False, traceback.format_exc()
            pipe.send_bytes(pickle.dumps(outcome))
        if transport == "nccl":
            dist.destroy_process_group()
    except (EOFError, KeyboardInterrupt):
        pass  # the parent has gone
