from __future__ import annotations

import pytest
import torch

import cpattn
from cpattn.testing import SoloCommunicator, run_loopback
from cpattn.transports.groups import as_transport


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_all_gather_brings_everything_in_the_order_of_ranks(size: int, dtype: torch.dtype) -> None:
    def program(communicator: cpattn.Communicator) -> tuple[torch.Tensor, int]:
        out = torch.empty(2 * size, 3, dtype=dtype)
        communicator.all_gather(out, torch.full((2, 3), communicator.rank).to(dtype)).wait()
        return out, communicator.bytes_sent

    expected = torch.arange(size).repeat_interleave(2)[:, None].expand(-1, 3).to(dtype)
    for out, sent in run_loopback(program, size):
        assert torch.equal(out, expected)
        assert sent == (size - 1) * 6 * dtype.itemsize


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shifts_go_round_the_ring(size: int) -> None:
    def program(communicator: cpattn.Communicator) -> list[int]:
        here, there = torch.tensor([communicator.rank]), torch.empty(1, dtype=torch.int64)
        seen = []
        for _ in range(size):
            seen.append(int(here))
            communicator.shift(there, here).wait()
            here, there = there, here
        return [*seen, int(here)]

    for rank, seen in enumerate(run_loopback(program, size)):
        assert seen == [(rank - hop) % size for hop in range(size + 1)]


@pytest.mark.parametrize("size", [2, 3, 7])
def test_shifts_by_any_number_of_ranks(size: int) -> None:
    def program(communicator: cpattn.Communicator) -> list[int]:
        came_from = []
        for by in [*range(1, size), *range(-size + 1, 0), size + 1]:
            out = torch.empty(1, dtype=torch.int64)
            communicator.shift(out, torch.tensor([communicator.rank]), by=by).wait()
            came_from.append((communicator.rank - int(out)) % size)
        assert communicator.bytes_sent == 8 * (2 * size - 1)
        return came_from

    assert run_loopback(program, size) == [[*range(1, size), *range(1, size), 1]] * size


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_all_to_all_brings_each_rank_its_part(size: int) -> None:
    def program(communicator: cpattn.Communicator) -> list[list[int]]:
        rank = communicator.rank
        out = torch.empty(size, 2, dtype=torch.int64)
        communicator.all_to_all(out, torch.tensor([[rank, to] for to in range(size)])).wait()
        assert communicator.bytes_sent == 16 * (size - 1)
        return [list(row) for row in out.tolist()]

    for rank, out in enumerate(run_loopback(program, size)):
        assert out == [[sender, rank] for sender in range(size)]


def test_transfers_in_flight_at_once_do_not_meet() -> None:
    """As pass_q_ring has them: queries go one way while results come back another."""

    def program(communicator: cpattn.Communicator) -> tuple[int, int, list[int]]:
        rank = communicator.rank
        there, back, everyone = torch.empty(1), torch.empty(1), torch.empty(4)
        works = [
            communicator.shift(there, torch.tensor([10.0 + rank])),
            communicator.shift(back, torch.tensor([20.0 + rank]), by=-2),
            communicator.all_to_all(everyone, 100.0 * rank + torch.arange(4.0)),
        ]
        for work in works:
            work.wait()
        return int(there), int(back), [int(x) for x in everyone]

    for rank, (there, back, everyone) in enumerate(run_loopback(program, 4)):
        assert there == 10 + (rank - 1) % 4
        assert back == 20 + (rank + 2) % 4
        assert everyone == [100 * sender + rank for sender in range(4)]


def test_the_sender_may_write_again_once_its_transfer_is_waited_for() -> None:
    def program(communicator: cpattn.Communicator) -> list[float]:
        message, out = torch.empty(1), torch.empty(1)
        got = []
        for call in range(20):
            message.fill_(100 * communicator.rank + call)
            communicator.shift(out, message).wait()
            got.append(out.item())
        return got

    for rank, got in enumerate(run_loopback(program, 3)):
        assert got == [100 * ((rank - 1) % 3) + call for call in range(20)]


def test_a_failing_rank_ends_the_waiting_of_the_others() -> None:
    def program(communicator: cpattn.Communicator) -> None:
        if communicator.rank == 1:
            raise KeyError("rank 1 has failed")
        communicator.all_gather(torch.empty(3), torch.empty(1)).wait()

    with pytest.raises(KeyError, match="rank 1 has failed"):
        run_loopback(program, 3)


def test_a_missing_call_times_out_with_a_hint() -> None:
    def program(communicator: cpattn.Communicator) -> None:
        if communicator.rank == 0:
            communicator.shift(torch.empty(1), torch.empty(1)).wait()

    with pytest.raises(TimeoutError, match="do all ranks make the same calls in the same order"):
        run_loopback(program, 2, timeout=0.2)


def test_messages_of_different_sizes_are_refused() -> None:
    def program(communicator: cpattn.Communicator) -> None:
        communicator.shift(torch.empty(1), torch.empty(1 + communicator.rank)).wait()

    with pytest.raises(RuntimeError, match=r"rank \d sent \d bytes"):
        run_loopback(program, 2)


def test_buffers_are_reused_and_grow() -> None:
    communicator = cpattn.LoopbackGroup(1).communicator(0)
    device = torch.device("cpu")
    small = communicator.buffer("a", (10, 2), torch.float32, device)
    assert communicator.buffer("a", (5,), torch.bfloat16, device).data_ptr() == small.data_ptr()
    assert communicator.buffer("b", (10, 2), torch.float32, device).data_ptr() != small.data_ptr()
    large = communicator.buffer("a", (1000, 2), torch.float32, device)
    assert large.shape == (1000, 2)
    assert communicator.buffer("a", (10, 2), torch.float32, device).data_ptr() == large.data_ptr()


def test_transfers_can_be_started_again_and_count_each_time() -> None:
    def program(communicator: cpattn.Communicator) -> list[list[float]]:
        x, gathered, shifted = torch.zeros(1), torch.zeros(3), torch.zeros(1)
        transfers = communicator.prepare_all_gather(gathered, x), communicator.prepare_shift(shifted, x, by=-1)
        results = []
        for layer in range(3):
            x.fill_(10 * layer + communicator.rank)
            for transfer in transfers:
                communicator.start(transfer).wait()
            results.append([*gathered.tolist(), *shifted.tolist()])
        assert communicator.bytes_sent == 3 * (2 * 4 + 4)
        return results

    for rank, results in enumerate(run_loopback(program, 3)):
        for layer, result in enumerate(results):
            assert result == [10 * layer, 10 * layer + 1, 10 * layer + 2, 10 * layer + (rank + 1) % 3]


@pytest.mark.parametrize("length", [0, 1, 6, 8, 32])
@pytest.mark.parametrize("offset", [0, 1, 8])
@pytest.mark.parametrize("size", [1, 3])
def test_a_rank_alone_gathers_its_own_message(size: int, offset: int, length: int) -> None:
    communicator = SoloCommunicator(size - 1, size)
    memory = torch.zeros(offset + size * length, dtype=torch.uint8)
    out = memory[offset:]
    own = out.view(size, length)[size - 1]
    own.copy_(torch.arange(length))
    communicator.all_gather(out, own).wait()
    assert out.tolist() == list(range(length)) * size
    other = torch.arange(length, dtype=torch.uint8) + 7
    communicator.all_gather(out, other).wait()
    assert out.tolist() == other.tolist() * size
    communicator.shift(out[:length], torch.full((length,), 5, dtype=torch.uint8)).wait()
    communicator.all_to_all(torch.empty_like(out), out).wait()
    assert out[:length].tolist() == [5] * length


def test_one_rank_needs_no_group_and_many_do() -> None:
    assert as_transport(None, 1).size == 1
    with pytest.raises(cpattn.GroupError, match=r"the plan has 4 ranks, but there is no process group: launch with torchrun"):
        as_transport(None, 4)
    with pytest.raises(cpattn.GroupError, match="group is a str; pass a ProcessGroup"):
        as_transport("cp", 4)  # type: ignore[arg-type]
