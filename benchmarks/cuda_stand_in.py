"""A CUDA device that is not there: tensors say that they are on it, and all else is the host's work as it would be.

Their numbers lie on the CPU, kernels are launched into nothing, and what a driver would be asked to do is counted. It is for a process of
its own: what the library remembers of devices stays.
"""

# mypy: allow-untyped-calls
from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import ANY, patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import cpattn
from cpattn.kernels import release
from cpattn.testing import SoloCommunicator
from cpattn.transports.peer_heap import PeerHeap, empty_heap
from cpattn.transports.peer_memory import PeerTransport
from cpattn.transports.transfer import Work

GPU = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="NVIDIA H100 80GB HBM3")
# What a GPU would copy is not copied: tables are smaller.
_MOST_COPIED = 2**18
_VIEWS = {
    "view", "_unsafe_view", "split", "split_with_sizes", "detach", "expand", "slice", "select", "unsqueeze", "as_strided", "transpose",
    "alias", "t", "permute", "squeeze", "unbind", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided",
}  # fmt: skip


class Counted(NamedTuple):
    """What one device was asked to do.

    Attributes:
        copies: from the host; waits: of the host for it; launches: of torch's kernels; kernels: of the library's own.
    """

    copies: int
    waits: int
    launches: int
    kernels: int


class OnDevice(Tensor):
    """Says that it is on the device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __torch_dispatch__(function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError("a tensor of the stand-in is used outside of it")

    @staticmethod
    def of(held: Tensor) -> OnDevice:
        shape = held.size(), held.stride(), held.storage_offset()
        made: Any = Tensor._make_wrapper_subclass(
            OnDevice, shape[0], strides=shape[1], storage_offset=shape[2], dtype=held.dtype, device=GPU
        )
        made.held = held
        return made  # type: ignore[no-any-return]

    # What torch would ask CUDA about before anyone else is.
    def __getitem__(self, index: Any) -> Any:
        with _not_counted():
            found = self.held[_held(index)]
            is_view = found.untyped_storage().data_ptr() == self.held.untyped_storage().data_ptr()
            _count("launches", not is_view)
            return OnDevice.of(found)

    def __setitem__(self, index: Any, value: Any) -> None:
        with _not_counted():
            _count("launches")
            self.held[_held(index)] = _held(value)

    def copy_(self, other: Tensor, non_blocking: bool = False) -> Tensor:
        with _not_counted():
            _count("launches" if type(other) is OnDevice else "copies")
            if self.held.numel() <= _MOST_COPIED:
                self.held.copy_(_held(other))
            return self

    def tolist(self) -> Any:
        _count("waits")
        with _disable_current_modes():
            return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def record_stream(self, stream: Any) -> None:
        pass


def _held(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_held(each) for each in value)
    return value.held if type(value) is OnDevice else value


class StandIn(TorchDispatchMode):
    """Within it ``device="cuda"`` is the stand-in.

    Attributes:
        seconds: of this thread, in what a GPU would have done, and in counting it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[str] = Counter()
        self.seconds = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else torch puts 20 us around each operation."""
        return False

    def count(self, what: str, many: int = 1) -> None:
        """So many more."""
        self._counts[what] += many

    def take(self) -> Counted:
        """What has been counted since the last time."""
        counted = Counted(*(self._counts[name] for name in Counted._fields))
        self._counts.clear()
        return counted

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        begin = time.thread_time()
        try:
            return self._run(function, args, dict(kwargs or {}))
        finally:
            self.seconds += time.thread_time() - begin

    def _run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        is_there = any(type(x) is OnDevice or (type(x) is list and any(type(y) is OnDevice for y in x)) for x in (*args, *kwargs.values()))
        name, device = function.overloadpacket.__name__, kwargs.get("device")
        comes_there = is_there if device is None else torch.device(device).type == "cuda"
        kwargs = {key: _held(value) for key, value in kwargs.items()} | ({} if device is None else {"device": torch.device("cpu")})
        kwargs |= {"pin_memory": False} if kwargs.get("pin_memory") else {}
        if is_there and (name == "_local_scalar_dense" or not comes_there):
            self.count("waits")
        elif comes_there and not is_there and name == "_to_copy":
            self.count("copies")
            self.count("waits", not kwargs.get("non_blocking", False))
        elif comes_there and name not in _VIEWS:
            self.count("launches")
        given = [_held(x) for x in args]
        out = function(*given, **kwargs)
        if not comes_there or not isinstance(out, (Tensor, list, tuple)):
            return out
        if isinstance(out, Tensor):
            in_place = next((x for x, held in zip(args, given, strict=True) if held is out), None)
            return OnDevice.of(out) if in_place is None else in_place
        return type(out)(OnDevice.of(each) for each in out)


_active: list[StandIn] = []


@contextmanager
def _not_counted() -> Iterator[None]:
    """The device's time."""
    begin = time.thread_time()
    with _disable_current_modes():
        yield
    _active[-1].seconds += time.thread_time() - begin


def _count(what: str, many: int = 1) -> None:
    _active[-1].count(what, many)


class SoloPeer(PeerTransport, SoloCommunicator):  # type: ignore[misc]
    """One rank of several that read each other's memory: all of it is its own."""

    _sharing = "are stood in for by one"
    _least_bytes = 2**30

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._set_up(30.0, insists=True)

    def _exchange(self, send: Any, receive: Any) -> Work:
        return Work(lambda: None)

    def _told_by_all(self, what: Any) -> list[Any]:
        return [what] * self.size

    def _why_not_shared(self, device: torch.device) -> str | None:
        return None

    def allocate_shared(self, nbytes: int, device: torch.device) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def make_heap(self, memory: Tensor, seal: int) -> PeerHeap:
        # Zeros that no page has been written for.
        with patch.object(Tensor, "zero_", lambda x: x):
            empty_heap(memory, self.limit, seal)
        return PeerHeap(memory, [memory.view(1, -1)] * self.size)


def transport(kind: str, rank: int, size: int) -> cpattn.Transport:
    """``"peer_memory"`` or ``"collectives"``."""
    return SoloPeer(rank, size) if kind == "peer_memory" else SoloCommunicator(rank, size)


@contextmanager
def cuda_stand_in() -> Iterator[StandIn]:
    """From here on there is a device; within it the fast ways of Triton are taken for open."""
    for gate in (release.DIRECT_LAUNCH, release.HOPPER_KERNEL):
        gate._verdict = release.Verdict(True, "it is stood in for")
    from cpattn.call import tensor_kinds
    from cpattn.kernels import direct_launch, hopper_attention, launch
    from cpattn.kernels.arguments import Blocks
    from cpattn.kernels.cuda_driver import TiledEncoder

    def ordinary(prepared: Any, tensors: Any) -> Any:
        """What Triton has compiled."""
        _count("kernels")
        descriptors = [
            {"swizzle": 3, "block_size": value.block, "fp4_padded": False}
            for value in prepared._arguments.values()
            if type(value) is Blocks
        ]
        metadata = SimpleNamespace(
            num_warps=4, num_ctas=1, shared=1000, launch_cooperative_grid=False, launch_pdl=False, global_scratch_size=0,
            profile_scratch_size=0, tensordesc_meta=descriptors,
        )  # fmt: skip
        return SimpleNamespace(function=1, metadata=metadata)

    def launched(*given: Any) -> int:
        _count("kernels")
        return 0

    assert hopper_attention is not None
    stream = SimpleNamespace(cuda_stream=0, wait_event=lambda event: None, wait_stream=lambda other: None)
    tensor = torch.tensor

    def tensor_there(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = tensor(data, **options)
        return made if device is None else made.to(device)

    of_torch: dict[str, Any] = {
        "_lazy_init": lambda: None, "is_current_stream_capturing": lambda: False, "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: (9, 0), "get_device_name": lambda device=None: PROPERTIES.name,
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "synchronize": lambda device=None: None,
        "current_stream": lambda device=None: stream, "Stream": lambda *given, **options: stream, "stream": lambda other: nullcontext(),
        "Event": lambda **options: SimpleNamespace(record=lambda *given: None),
    }  # fmt: skip
    with ExitStack() as stack:
        for name, stand_in in of_torch.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        stack.enter_context(patch.object(torch, "tensor", tensor_there))
        stack.enter_context(patch.object(torch._C, "_cuda_getDevice", lambda: 0, create=True))
        stack.enter_context(patch.object(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, create=True))
        stack.enter_context(patch.object(tensor_kinds, "_PLAIN", OnDevice.__torch_dispatch__))
        stack.enter_context(patch.object(launch._Prepared, "_ordinary", ordinary))
        stack.enter_context(patch.object(direct_launch, "parameter_sizes", lambda function: ANY))
        stack.enter_context(patch.object(direct_launch, "driver", lambda: SimpleNamespace(cuLaunchKernelEx=launched)))
        stack.enter_context(patch.object(TiledEncoder, "__init__", lambda *given: None))
        stack.enter_context(patch.object(TiledEncoder, "__call__", lambda *given: memoryview(bytes(128)).cast("Q")))
        _active.append(StandIn())
        try:
            yield stack.enter_context(_active[-1])
        finally:
            _active.pop()
