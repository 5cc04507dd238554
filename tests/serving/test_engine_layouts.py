"""Where tokens lie, compared with what vLLM and SGLang compute themselves: 1,000 random layouts each, no attention.

Their functions come from their own releases (``make test-engines``); without them these tests are skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
import torch
from engines import engine_functions
from torch import Tensor

import cpattn

LAYOUTS = 1000
# Calls a function that vLLM's second runner calls within its kernels.
_CALLER = """
@triton.jit
def slots_of(positions, blocks, slots, count, page_size, rank, SIZE: tl.constexpr, INTERLEAVE: tl.constexpr, MOST: tl.constexpr):
    row = tl.arange(0, MOST)
    is_there = row < count
    position, block = tl.load(positions + row, mask=is_there), tl.load(blocks + row, mask=is_there)
    tl.store(slots + row, cp_local_slot(position, block, page_size, rank, SIZE, INTERLEAVE, -1), mask=is_there)
"""


class Layout(NamedTuple):
    """A step of an engine: its requests, and a table of the pages that it has given them.

    Attributes:
        rank: whose slots are compared.
        table: int32 ``[requests, pages]``; each page has ``page_size`` tokens of a request on each rank.
    """

    plan: cpattn.Plan
    rank: int
    interleave: int
    page_size: int
    table: Tensor

    @property
    def positions(self) -> Tensor:
        """Of all new tokens, request after request."""
        return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(p, p + n) for p, n in self.plan.batch)])

    @property
    def requests(self) -> Tensor:
        """Which request each is of."""
        return torch.arange(len(self.plan.batch)).repeat_interleave(torch.from_numpy(self.plan.extend_lens.copy()))

    @property
    def begins(self) -> Tensor:
        """Where each request's new tokens begin, and where the last one's end."""
        return torch.tensor([0, *np.cumsum(self.plan.extend_lens).tolist()], dtype=torch.int32)

    @property
    def slots(self) -> Tensor:
        """Of all new tokens the slot on this rank, as cpattn has them; -1 where another rank holds one."""
        meta = self.plan.metadata(self.rank)
        return cpattn.slot_mapping(meta, self.table, self.page_size)[meta.restore_index.long()]


def layouts(sizes: tuple[int, ...] = (2, 3, 4, 8), interleave: int | None = None) -> Iterator[Layout]:
    """The same ones each time. An engine's page holds whole turns, so that a turn does not end in the midst of a page."""
    rng = np.random.default_rng(0)
    for _ in range(LAYOUTS):
        cp_size = int(rng.choice(sizes))
        turn = interleave or int(rng.choice([1, 1, 2, 4, 16]))
        page_size = turn * int(rng.choice([1, 2, 3, 4]))
        prefixes = rng.integers(0, 1 + rng.choice([0, 1, 40, 300]), rng.integers(1, 5))
        # A decode, drafts, a chunk of a prompt, or nothing new.
        batch = [(int(prefix), int(rng.choice([0, 1, 4, int(rng.integers(1, 60))]))) for prefix in prefixes]
        partition = str(rng.choice(["zigzag", "contiguous", "whole"]))
        plan = cpattn.plan(batch, cp_size, partition=partition, owner=cpattn.Striped(turn))
        width = max(1, -(-int(plan.total_lens.max()) // (page_size * cp_size)))
        table = rng.permutation(1000)[: len(batch) * width].reshape(-1, width)
        yield Layout(plan, int(rng.integers(cp_size)), turn, page_size, torch.from_numpy(table.astype(np.int32)))


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    pytest.importorskip("triton")
    folder, into = engine_functions.folder_of("vllm") / "vllm" / "v1", tmp_path_factory.mktemp("vllm")
    on_gpu = folder / "worker/gpu"
    functions = {
        "lengths": [(folder / "attention/backends/utils.py", "get_dcp_local_seq_lens")],
        "lengths on a GPU": [
            (on_gpu / "cp_utils.py", "_dcp_local_seq_lens_kernel"),
            (on_gpu / "cp_utils.py", "prepare_dcp_local_seq_lens"),
        ],
        "slots": [(folder / "worker/block_table.py", "ComputeSlotMappingKernel.kernel")],
        "slots of runner 2": [(on_gpu / "cp_utils.py", "cp_local_slot")],
    }
    return {name: engine_functions.take(into, *parts, more=_CALLER if "2" in name else "") for name, parts in functions.items()}


@pytest.fixture(scope="module")
def sglang(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    file = engine_functions.folder_of("sglang") / "sglang/srt/layers/dcp/layout.py"
    names = ["get_dcp_lens", "localize_dcp_indices", "maybe_dcp_kernel_indices"]
    return engine_functions.take(tmp_path_factory.mktemp("sglang"), *((file, name) for name in names))


def test_vllm_counts_as_many_tokens_on_each_rank(vllm: dict[str, ModuleType]) -> None:
    """Before a step, which is what its attention takes for the context, and after it."""
    for plan, rank, interleave, *_ in layouts():
        for lengths, ours in ((plan.prefix_lens, plan.shard_lens), (plan.total_lens, plan.held_lens)):
            given = torch.from_numpy(lengths.copy())
            theirs = vllm["lengths"].get_dcp_local_seq_lens(given, plan.cp_size, None, interleave)
            assert theirs.tolist() == ours.tolist()
            of_rank = vllm["lengths"].get_dcp_local_seq_lens(given, plan.cp_size, rank, interleave)
            assert of_rank.tolist() == ours[:, rank].tolist()


def test_vllm_counts_as_many_tokens_on_a_gpu(vllm: dict[str, ModuleType]) -> None:
    memory = torch.empty(8, dtype=torch.int32)
    for plan, rank, interleave, *_ in layouts():
        lengths = torch.from_numpy(plan.total_lens.astype(np.int32))
        theirs = vllm["lengths on a GPU"].prepare_dcp_local_seq_lens(memory, lengths, len(lengths), plan.cp_size, rank, interleave)
        assert theirs.tolist() == plan.held_lens[:, rank].tolist() + [0] * (len(memory) - len(lengths))


def test_vllm_puts_new_tokens_into_the_same_slots(vllm: dict[str, ModuleType]) -> None:
    for layout in layouts():
        plan, rank, interleave, page_size, table = layout
        positions = layout.positions
        theirs = torch.full((len(positions) + 3,), -7, dtype=torch.int64)
        vllm["slots"].kernel[(len(plan.batch) + 1,)](
            len(positions),
            len(theirs),
            layout.begins,
            positions,
            table,
            table.stride(0),
            theirs,
            KV_CACHE_BLOCK_SIZE=page_size,
            TOTAL_CP_WORLD_SIZE=plan.cp_size,
            TOTAL_CP_RANK=rank,
            CP_KV_CACHE_INTERLEAVE_SIZE=interleave,
            PAD_ID=-1,
            BLOCK_SIZE=64,
        )
        assert theirs.tolist() == [*layout.slots.tolist(), -1, -1, -1]


def test_so_does_its_second_runner(vllm: dict[str, ModuleType]) -> None:
    for layout in layouts():
        plan, rank, interleave, page_size, table = layout
        positions = layout.positions
        blocks = table[layout.requests, positions // (page_size * plan.cp_size)].long()
        theirs = torch.full_like(positions, -7)
        vllm["slots of runner 2"].slots_of[(1,)](
            positions, blocks, theirs, len(positions), page_size, rank, SIZE=plan.cp_size, INTERLEAVE=interleave, MOST=256
        )
        assert theirs.tolist() == layout.slots.tolist()


def test_sglang_counts_as_many_tokens_on_each_rank(sglang: ModuleType) -> None:
    """And as many new ones, and gives each the same number there."""
    for plan, rank, interleave, *_ in layouts():
        prefixes, extends, totals = (torch.from_numpy(x.copy()) for x in (plan.prefix_lens, plan.extend_lens, plan.total_lens))
        held = sglang.get_dcp_lens(totals, plan.cp_size, rank, interleave_size=interleave)
        assert held.tolist() == plan.held_lens[:, rank].tolist()
        new = sglang.get_dcp_lens(extends, plan.cp_size, rank, start=prefixes, interleave_size=interleave)
        assert new.tolist() == (plan.held_lens - plan.shard_lens)[:, rank].tolist()
        positions, rule = torch.arange(int(totals.max())), cpattn.Striped(interleave)
        is_own = rule.ranks(positions, plan.cp_size) == rank
        numbers = torch.where(is_own, rule.numbers(positions, plan.cp_size), -1)
        assert torch.equal(sglang.localize_dcp_indices(positions, plan.cp_size, rank, interleave), numbers)


def test_sglang_puts_slots_of_its_pool_on_the_same_ranks(sglang: ModuleType) -> None:
    """A page of its pool is a page of each rank, with as many tokens as there are ranks less often."""
    for layout in layouts(interleave=1):
        plan, rank, _, page_size, table = layout
        size, of_pool = plan.cp_size, page_size * plan.cp_size
        assert plan.owner == cpattn.Striped.by_slot(page_size=of_pool, cp_size=size)
        request, positions = layout.requests, layout.positions
        slots = table[request, positions // of_pool] * of_pool + positions % of_pool
        assert torch.equal(sglang.localize_dcp_indices(slots, size, rank), layout.slots)
        # Of a prompt, whose slots begin with a page: those of this rank alone, without a mask.
        for number, (prefix, extend) in enumerate(plan.batch):
            if prefix == 0:
                mine = layout.slots[request == number]
                assert sglang.maybe_dcp_kernel_indices(slots[request == number], size, rank).tolist() == mine[mine >= 0].tolist(), extend
