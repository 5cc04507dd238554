"""A kernel that Triton has compiled, launched by the CUDA driver's own function.

Of Triton this takes what has not changed since 3.5 and follows from what a compiled kernel is. That is its handle, how many
warps and how much shared memory it wants, and how its descriptors lie in shared memory. Which parameters it has and how wide
they are the driver says; where that is not what the arguments make, Triton launches it.

A launch takes 1.2 us of the host beside the driver's own time. Triton 3.6's C function, called with the same arguments,
takes 2.4 (the Hopper kernel's 41 parameters, one x86 core).
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpattn.kernels.arguments import Blocks, Words
from cpattn.kernels.cuda_driver import (
    AS_DEPENDENT,
    DESCRIPTOR_WORDS,
    INVALID_CONTEXT,
    LaunchConfig,
    TiledEncoder,
    check,
    driver,
    parameter_sizes,
    use_context_of,
)  # fmt: skip
from cpattn.memo import Memo

# Kinds of descriptors that are remembered, and buffers of each: the pages of as many layers.
_MOST_ENCODERS = 64
_MOST_ENCODED = 1024
# Above this a launch needs an attribute, on GPUs to come.
_MOST_SHARED_BYTES = 228 * 1024
_POINTER_BYTES = 8
# Triton adds pointers to scratch memory, for the program's own use and for a profiler's.
_NUM_SCRATCH = 2
# CUtensorMapDataType.
_DATA_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
# Words of a cache line, at whose begin descriptors lie.
_LINE = 8
_STREAM = LaunchConfig.stream.offset // 8
_TWO_64 = 2**64

# ``again(stream, addresses)`` launches with these addresses among the arguments.
Again = Callable[[int, "list[int]"], None]


class NotAsExpectedError(Exception):
    """A compiled kernel, or the Triton that made it, is not as this file expects; the message says in what."""


class Encoding(NamedTuple):
    """How a descriptor's blocks lie in shared memory, and the shape of those that are copied at a time."""

    swizzle: int
    block: tuple[int, ...]


class Compiled(NamedTuple):
    """What Triton has compiled, as far as a launch needs it.

    Attributes:
        kernel: Triton's, which frees the kernel when it goes.
        function: the driver's handle.
        threads, shared_bytes: of a program.
        is_dependent: whether it may begin before the launch before it in the stream has ended.
        encodings: of each descriptor, in order.
        parameters: what it is given: the name of each argument, in order.
    """

    kernel: Any
    function: int
    threads: int
    shared_bytes: int
    is_dependent: bool
    encodings: list[Encoding]
    parameters: list[str]


def compiled_form(kernel: Any, arguments: dict[str, Any], roles: dict[str, str]) -> Compiled:
    """What a launch needs of a kernel that Triton has compiled and launched with these arguments.

    Raises:
        NotAsExpectedError: only Triton can launch it.
    """
    try:
        metadata = kernel.metadata
        if metadata.num_ctas != 1 or metadata.launch_cooperative_grid or metadata.shared > _MOST_SHARED_BYTES:
            raise NotAsExpectedError("it wants launch attributes")
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotAsExpectedError("it wants scratch memory")
        descriptors = getattr(metadata, "tensordesc_meta", None) or []
        if any(each["fp4_padded"] or each.get("is_im2col", False) for each in descriptors):
            raise NotAsExpectedError("it wants descriptors of another kind")
        encodings = [Encoding(each["swizzle"], tuple(each["block_size"])) for each in descriptors]
        sizes = 32 * metadata.num_warps, metadata.shared
        parameters = [name for name, _ in _passed(arguments, roles)]
        compiled = Compiled(kernel, int(kernel.function), *sizes, bool(metadata.launch_pdl), encodings, parameters)
    except (AttributeError, KeyError, TypeError) as error:
        raise NotAsExpectedError(f"Triton does not say what a launch needs: {type(error).__name__} {error}") from error
    has = parameter_sizes(compiled.function)
    expected = [size for _, value in _passed(arguments, roles) for size in _sizes(value)] + [_POINTER_BYTES] * _NUM_SCRATCH
    if has != expected:
        raise NotAsExpectedError(f"its parameters have {has} bytes, not {expected}")
    blocks = [value for value in arguments.values() if type(value) is Blocks]
    if len(encodings) != len(blocks) or any(value.source.dtype not in _DATA_TYPES for value in blocks):
        raise NotAsExpectedError(f"it has {len(encodings)} descriptors, not {len(blocks)}, or of another dtype")
    return compiled


def _passed(arguments: dict[str, Any], roles: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """The arguments that a compiled kernel is given: all but constants, which a number is too where it is 1."""
    for name, value in arguments.items():
        is_one = roles[name] == "number" and type(value) is int and value == 1
        if roles[name] != "constant" and not is_one:
            yield name, value


def _sizes(value: Any) -> list[int]:
    """The bytes of each parameter that a value becomes."""
    if type(value) is Blocks:
        return [8 * DESCRIPTOR_WORDS] + [4] * len(value.shape) + [8] * len(value.strides)
    if isinstance(value, Tensor) or type(value) is Words:
        return [_POINTER_BYTES]
    if isinstance(value, float):
        # All are fp32.
        return [4]
    if type(value) is int and value < _TWO_64 // 2:
        return [4 if -(2**31) <= value < 2**31 else 8]
    raise NotAsExpectedError(f"an argument is {value!r}")


class _Frame(NamedTuple):
    """The memory of one launch, which nobody else uses meanwhile.

    Attributes:
        words: all of it; config, pointers: where it holds the configuration, and the pointers to the parameters.
    """

    words: memoryview
    config: ctypes.c_void_p
    pointers: ctypes.c_void_p


class _Layout:
    """What a launch's memory holds: its configuration, descriptors, a pointer to each parameter, and the parameters that
    are no descriptors, in a word each.

    Args:
        config: of the launch.
        descriptors: in order.
        parameters: what each is: a word, or None for the next descriptor.
        given: of parameters that change with every launch which of its addresses they are.
        num_addresses: that a launch is given. They lie one after another: to write them one by one would take twice as long.
    """

    def __init__(
        self, config: LaunchConfig, descriptors: list[memoryview], parameters: list[int | None], given: dict[int, int], num_addresses: int
    ) -> None:
        filled = memoryview(config).cast("B").cast("Q")
        self._words = array("Q", [*filled, *[0] * (_LINE - len(filled))])
        for descriptor in descriptors:
            self._words.extend(descriptor)
        self._pointers = len(self._words)
        first = self._pointers + len(parameters)
        # Where the addresses are that a launch is given, and each parameter.
        self.addresses = first + len(parameters)
        self.places: list[int] = []
        next_descriptor = _LINE
        for i, word in enumerate(parameters):
            own_place = first + i if word is not None else next_descriptor
            self.places.append(self.addresses + given[i] if i in given else own_place)
            next_descriptor += DESCRIPTOR_WORDS * (word is None)
        self._words.extend([0] * len(parameters))
        self._words.extend([word or 0 for word in parameters])
        self._words.extend([0] * num_addresses)

    def make(self) -> _Frame:
        """Memory for one launch, filled but for the stream and what changes."""
        size = len(self._words)
        memory = (ctypes.c_uint64 * (size + _LINE))()
        skipped = -ctypes.addressof(memory) // 8 % _LINE
        begin = ctypes.addressof(memory) + 8 * skipped
        words = memoryview(memory).cast("B").cast("Q")[skipped : skipped + size]
        words[:] = memoryview(self._words)
        words[self._pointers : self._pointers + len(self.places)] = array("Q", [begin + 8 * place for place in self.places])
        return _Frame(words, ctypes.c_void_p(begin), ctypes.c_void_p(begin + 8 * self._pointers))


def again_form(
    compiled: Compiled, device: int, grid: tuple[int, int], arguments: dict[str, Any], tensors: dict[str, int], num_addresses: int
) -> Again:
    """What launches this kernel again, given so many addresses.

    Args:
        arguments: all of the kernel's, of some launch of this kind.
        tensors: which address belongs to which of them; the others stay.
    """
    parameters: list[int | None] = []
    filled: list[memoryview] = []
    # Of the parameters that change, which address each is; and of descriptors, what makes one of it.
    given: dict[int, int] = {}
    changing: list[tuple[int, int, Callable[[int], memoryview]]] = []
    encodings = iter(compiled.encodings)
    for name in compiled.parameters:
        value, tensor = arguments[name], tensors.get(name)
        if type(value) is Blocks:
            encoded = _encoder(next(encodings), value)
            if tensor is not None:
                changing.append((len(parameters), tensor, encoded))
            filled.append(encoded(value.source.data_ptr()))
            parameters += [None, *value.shape, *value.strides]
        elif tensor is not None:
            given[len(parameters)] = tensor
            parameters.append(0)
        else:
            parameters.append(_word(value))
    parameters += [0] * _NUM_SCRATCH

    config = LaunchConfig(*grid, 1, compiled.threads, 1, 1, compiled.shared_bytes)
    if compiled.is_dependent:
        config.attributes, config.num_attributes = AS_DEPENDENT, 1
    layout = _Layout(config, filled, parameters, given, num_addresses)
    put, at_addresses = struct.Struct(f"{num_addresses}Q").pack_into, 8 * layout.addresses
    descriptors = [(layout.places[i], layout.places[i] + DESCRIPTOR_WORDS, tensor, encoded) for i, tensor, encoded in changing]
    launch, function = driver().cuLaunchKernelEx, ctypes.c_void_p(compiled.function)
    free: list[_Frame] = []

    def again(stream: int, addresses: list[int]) -> None:
        # Several threads may launch at once: taking a frame and giving it back are atomic.
        try:
            frame = free.pop()
        except IndexError:
            frame = layout.make()
        words, at_config, at_pointers = frame
        words[_STREAM] = stream
        put(words, at_addresses, *addresses)
        for begin, end, i, encoded in descriptors:
            words[begin:end] = encoded(addresses[i])
        result = launch(at_config, function, at_pointers, None)
        if result == INVALID_CONTEXT:
            # This thread has not called into CUDA yet.
            use_context_of(device)
            result = launch(at_config, function, at_pointers, None)
        free.append(frame)
        if result:
            check(result, "launching a kernel")

    return again


def _word(value: Any) -> int:
    """What a pointer or number is in memory, which begins with its lowest byte."""
    if type(value) is int:
        return value % _TWO_64
    if isinstance(value, float):
        bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
        return bits
    source = value.source if type(value) is Words else value
    return source.data_ptr() if isinstance(source, Tensor) else int(source) % _TWO_64


_encoders: Memo[Hashable, Callable[[int], memoryview]] = Memo(_MOST_ENCODERS)


def _encoder(encoding: Encoding, blocks: Blocks) -> Callable[[int], memoryview]:
    """What makes a descriptor of an address; once for each buffer, which layers and batches use again."""
    key = encoding.swizzle, encoding.block, blocks.source.dtype, *blocks.shape, *blocks.strides
    found = _encoders.get(key)
    if found is not None:
        return found
    encode = TiledEncoder(
        _DATA_TYPES[blocks.source.dtype], blocks.source.element_size(), encoding.swizzle, blocks.shape, blocks.strides, encoding.block
    )
    known: Memo[int, memoryview] = Memo(_MOST_ENCODED)

    def encoded(address: int) -> memoryview:
        descriptor = known.get(address)
        return known.keep(address, encode(address)) if descriptor is None else descriptor

    return _encoders.keep(key, encoded)
