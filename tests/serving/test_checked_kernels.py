"""check=True finds a caller's kernel that is wrong, on one rank or on all, and every rank raises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from inputs.cases import AttentionCase
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions, Backend
from cpattn.attention.registry import find_backend
from cpattn.call.arguments import Arguments
from cpattn.call.find import find_call
from cpattn.keys import Keys
from cpattn.spans import Spans
from cpattn.testing import SoloCommunicator, run_loopback

REFERENCE = cpattn.BACKENDS["reference"]

EXCHANGES = [("all_gather", "packed"), ("all_gather", "paged"), ("ring", "packed"), ("ring", "sharded"), ("pass_q", "sharded")]


def right(q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, *, out_dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor]:
    return cpattn.BACKENDS["reference"].run(q, k, v, rows, AttentionOptions(**options), out_dtype)


def in_base_2(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = right(*arguments, **options)
    return out, lse / torch.tensor(2.0).log()


def without_window(*arguments: Any, window: int | None, **options: Any) -> tuple[Tensor, Tensor]:
    return right(*arguments, window=None, **options)


@pytest.mark.parametrize("wrong_ranks", [[1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize(("strategy", "cache"), EXCHANGES)
def test_a_wrong_lse_raises_on_every_rank(strategy: str, cache: str, wrong_ranks: list[int]) -> None:
    case = AttentionCase([(20, 40), (0, 23)], cache=cache)
    plan = case.plan(3)

    def program(group: cpattn.Communicator) -> str:
        kernel: Any = in_base_2 if group.rank in wrong_ranks else right
        with pytest.raises(cpattn.BackendError) as raised:
            case.on_rank(plan, group.rank, group, strategy, kernel, check=True)
        # The next call works.
        case.on_rank(plan, group.rank, group, strategy, right, check=True)
        return str(raised.value)

    for rank, message in enumerate(run_loopback(program, 3, timeout=20)):
        assert ("rank 1 found this of its own result: " in message) == (rank not in wrong_ranks)
        assert "backend='in_base_2': query " in message
        assert "custom_backend(..., lse_base=2)" in message


def test_a_wrong_result_raises_and_a_declared_base_does_not() -> None:
    case = AttentionCase([(0, 40)], window=7)
    plan = case.plan(1)
    with pytest.raises(cpattn.BackendError, match=r"backend=.without_window.: query .*differs from the reference.*check_backend"):
        case.on_rank(plan, 0, None, "all_gather", without_window, check=True)
    case.on_rank(plan, 0, None, "all_gather", cpattn.custom_backend(in_base_2, lse_base=2), check=True)
    # Unchecked, nothing is compared.
    case.on_rank(plan, 0, None, "all_gather", without_window)


def test_a_backend_object_of_the_callers_is_checked_and_compared() -> None:
    """Built anew, or a copy of one of the library's; the library's own are neither."""
    case = AttentionCase([(0, 40)])
    plan = case.plan(1)

    def backend(change: Callable[[Tensor, Tensor], Any]) -> Backend:
        def attend(q: Tensor, keys: Keys, spans: Spans, options: AttentionOptions, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            returned: tuple[Tensor, Tensor] = change(*REFERENCE.attend(q, keys, spans, options, out_dtype))
            return returned

        return replace(REFERENCE, name="own", attend=attend)

    half = backend(lambda out, lse: (out, lse / 2))
    case.on_rank(plan, 0, None, "all_gather", half)
    with pytest.raises(cpattn.BackendError, match=r"backend='own': query .*differs from the reference"):
        case.on_rank(plan, 0, None, "all_gather", half, check=True)
    with pytest.raises(cpattn.BackendError, match=r"backend='own' returned a tensor of shape .*; a kernel returns a pair of tensors"):
        case.on_rank(plan, 0, None, "all_gather", backend(lambda out, lse: out))
    case.on_rank(plan, 0, None, "all_gather", backend(lambda out, lse: (out, lse)), check=True)
    assert find_backend(REFERENCE) is REFERENCE
    assert not REFERENCE.callers


def test_a_callers_backend_is_wrapped_once() -> None:
    """Not in every layer."""
    backend = replace(REFERENCE, name="own")
    meta, group = cpattn.build_metadata([(0, 4)], 1, 0), SoloCommunicator(0, 1)
    calls = []
    for _ in range(2):
        x = torch.randn(4, 2, 8)
        given = Arguments(x, x, x, None, None, "all_gather", backend, 1, None, None, None, None)
        calls.append(find_call(given, meta, group))
    assert calls[0] is calls[1]


def test_attend_compares_too() -> None:
    case = AttentionCase([(5, 4)], cache="paged")
    plan = case.plan(1)
    meta, cache = plan.metadata(0), case.pages(plan, 0).cache
    cpattn.write_kv(case.k, case.v, cache, cpattn.slot_mapping(meta, cache.page_table, cache.page_size))

    def attend(kernel: Callable[..., Any]) -> Tensor:
        return cpattn.attend(case.q, cache, meta, backend=kernel, check=True)

    torch.testing.assert_close(attend(right), case.expected[0].float())
    with pytest.raises(cpattn.BackendError, match="lse_base=2"):
        attend(in_base_2)
