"""The sum of what all ranks have for this one: exact to the rounding, and of the same bits whatever carries it."""

from __future__ import annotations

import pytest
import torch
from programs import split_programs as programs
from torch import Tensor

import cpattn
from cpattn.testing import run_loopback
from cpattn.transports.in_flight import InFlight

CPU = torch.device("cpu")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_sums_in_the_order_of_ranks(size: int, dtype: torch.dtype) -> None:
    results = run_loopback(lambda group: programs.reduce_scatter(group, CPU, dtype), size)
    for (out, sent), want in zip(results, programs.reduce_scatter_sums(size, dtype), strict=True):
        assert torch.equal(out, want)
        assert sent == (size - 1) * want.nbytes


def test_along_an_axis() -> None:
    """Ranks 1 and 4 of six are the two of a part."""
    results = run_loopback(lambda group: programs.reduce_scatter(group.split(2, 3)[0], CPU, torch.bfloat16), 6)
    for rank, (out, sent) in enumerate(results):
        assert torch.equal(out, programs.reduce_scatter_sums(2, torch.bfloat16)[rank // 3])
        assert sent == out.nbytes


def test_two_in_flight_at_once_have_their_own_scratch() -> None:
    def program(group: cpattn.Transport) -> list[list[float]]:
        x = torch.arange(3.0)
        outs = [torch.empty(()), torch.empty(())]
        transfers = [group.prepare_reduce_scatter(out, x * 10**n, scratch=f"sum {n}") for n, out in enumerate(outs)]
        for work in [group.start(transfer) for transfer in transfers]:
            work.wait()
        return [[out.item()] for out in outs]

    assert run_loopback(program, 3) == [[[3.0 * rank], [30.0 * rank]] for rank in range(3)]


def test_a_rank_that_fails_to_make_its_part_sends_nan() -> None:
    def program(group: cpattn.Transport) -> tuple[list[float], list[float]]:
        x, out = torch.ones(2, 3), torch.empty(3)
        seen = []
        for turn in range(2):
            try:
                with InFlight(group, CPU) as in_flight:
                    in_flight.expect(lambda: [group.prepare_reduce_scatter(out, x)])
                    x.fill_(turn + 1.0)
                    if turn == 0 and group.rank == 1:
                        raise ArithmeticError("no part")
                    in_flight.start().wait()
            except ArithmeticError:
                assert group.rank == 1
            seen.append(out.tolist())
        return seen[0], seen[1]

    first, second = zip(*run_loopback(program, 2), strict=True)
    assert all(value != value for value in first[0])
    assert second == ([4.0] * 3,) * 2


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (torch.zeros(2, 4), torch.zeros(4)),
        (torch.zeros(3, 4), torch.zeros(4, dtype=torch.bfloat16)),
        (torch.zeros(3, 4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(3, 4, dtype=torch.float8_e4m3fn), torch.zeros(4, dtype=torch.float8_e4m3fn)),
        (torch.zeros(3, 4), torch.zeros(4, device="meta")),
    ],
    ids=["size", "dtype", "integers", "fp8", "device"],
)
def test_what_does_not_fit(x: Tensor, out: Tensor) -> None:
    with pytest.raises(cpattn.TensorMismatchError, match=r"reduce_scatter over 3 ranks: x is .*; x must be \[3, \*out\.shape\]"):
        cpattn.LoopbackGroup(3).transport(0).reduce_scatter(out, x)
