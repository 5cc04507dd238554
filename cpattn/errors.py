"""Everything cpattn refuses, by kind. A message says what was passed, the rule, and the fix."""

from __future__ import annotations


def shown(value: object) -> str:
    """An argument as a message shows it: its repr, cut where it is long."""
    try:
        text = repr(value)
    except Exception:  # an integer of thousands of digits has none
        return f"a {type(value).__name__} of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


_LONGEST_VALUE = 200


def in_a_line(error: BaseException) -> str:
    """An exception as another message quotes it: its type and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class CPError(ValueError):
    """Base of all errors that cpattn raises about its input."""


class BatchError(CPError):
    """The batch is not a sequence of (prefix_len, extend_len) pairs of non-negative integers."""


class PlanError(CPError):
    """An option of the plan is out of its range: cp_size, partition, remainder, pad_to."""


class RankError(CPError):
    """A cp_rank outside 0 .. cp_size - 1."""


class RowCountError(CPError):
    """A tensor has another number of rows than the plan or the metadata says."""


class HeadCountError(CPError):
    """Query heads are not a multiple of key/value heads, or K, V or sinks have another head count."""


class TensorMismatchError(CPError):
    """Tensors that go together differ in rank, dtype, device or head dimension, or one is of a kind that kernels cannot read."""


class OptionError(CPError):
    """An option is out of its range: scale, window, softcap, sinks; or one of ``custom_backend``. Or there is none of that name."""


class PrefixError(CPError):
    """The KV cache does not hold the prefix that the batch speaks of."""


class PageTableError(PrefixError):
    """Pages or a page table of the wrong form, too narrow, with numbers of pages that do not exist, or with two tokens in one slot."""


class PoolFullError(CPError):
    """A KVPool has fewer free pages than are asked for. Nothing has changed."""


class GroupError(CPError):
    """The process group does not fit the metadata (another size, another rank, or none at all), or cannot be used. Two calls were
    made on it at once, or a transfer failed or was interrupted. Then it is given up, and every later call on it raises this."""


class DisagreementError(CPError):
    """The ranks of a checked call do not agree (other plans, arguments, labels or numbers of calls), or one of them refused it or
    failed in the middle of it."""


class UnknownNameError(CPError):
    """A strategy or backend of that name does not exist."""


class UnsupportedError(CPError):
    """The chosen strategy or backend lacks a feature that the call needs."""


class BackendError(CPError):
    """A caller's kernel returned something else than it must, or, where that is compared, a wrong result."""
