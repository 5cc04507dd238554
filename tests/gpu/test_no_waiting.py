"""cp_attention on CUDA never waits for the device, and can be captured in a graph and replayed with new inputs."""

from __future__ import annotations

import pytest
import torch
from inputs.cases import AttentionCase

import cpattn
from cpattn.testing import SoloCommunicator

BATCH = [(0, 777), (640, 300), (0, 3), (997, 1), (131, 89)]
BACKENDS = ["flash_attn4", "flash_attn3", "torch_flash", "triton"]


def usable(backend: str) -> None:
    reason = cpattn.BACKENDS[backend].unavailable()
    if reason:
        pytest.skip(reason)


def make_case() -> AttentionCase:
    return AttentionCase(BATCH, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_host_synchronisation(backend: str, strategy: str) -> None:
    usable(backend)
    case = make_case()
    communicator = SoloCommunicator(1, 4)

    def step() -> None:
        """All of a batch's work, from building the metadata to the output of its layers."""
        meta = cpattn.build_metadata(BATCH, cp_size=4, cp_rank=1, device="cuda")
        q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
        for _ in range(2):
            out = cpattn.cp_attention(q, k, v, meta, group=communicator, kv_cache=case.prefix, strategy=strategy, backend=backend)
        cpattn.unshard(out, meta, group=communicator)

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("strategy", ["all_gather", "ring"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_graph_replays_with_new_inputs(backend: str, strategy: str) -> None:
    usable(backend)
    case = make_case()
    communicator = SoloCommunicator(1, 4)
    meta = cpattn.build_metadata(BATCH, cp_size=4, cp_rank=1, device="cuda")
    inputs = [cpattn.shard(x, meta) for x in (case.q, case.k, case.v)]

    def attend() -> torch.Tensor:
        q, k, v = inputs
        return cpattn.cp_attention(q, k, v, meta, group=communicator, kv_cache=case.prefix, strategy=strategy, backend=backend)

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend()
        attend()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for seed in (1, 2):
        torch.manual_seed(seed)
        for x in inputs:
            x.copy_(torch.randn_like(x))
        graph.replay()
        replayed = captured.clone()
        assert torch.equal(replayed, attend())


@pytest.mark.parametrize("backend", BACKENDS)
def test_calls_allocate_only_what_they_return(backend: str) -> None:
    usable(backend)
    case = make_case()
    communicator = SoloCommunicator(1, 4)
    meta = cpattn.build_metadata(BATCH, cp_size=4, cp_rank=1, device="cuda")
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    for _ in range(2):
        cpattn.cp_attention(q, k, v, meta, group=communicator, kv_cache=case.prefix, backend=backend)
    before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
    out, lse = cpattn.cp_attention(q, k, v, meta, group=communicator, kv_cache=case.prefix, backend=backend, return_lse=True)
    allocated = torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before
    assert allocated <= 2 * (out.nbytes + lse.nbytes) + 2**20


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_a_pools_copies_and_zeros_do_not_wait(sharded: bool) -> None:
    pool = cpattn.KVPool(64, 16, 2, 2, 64, dtype=torch.bfloat16, device="cuda", cp_size=2, cp_rank=0, sharded=sharded)
    pool.admit("a")
    pool.plan([("a", 41)])
    pool.k_pages.fill_(1.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pool.fork("a", "b", 41)
        step = pool.plan([("b", 100), ("a", 7)])
        pool.k_pages.fill_(torch.nan)
        pool.undo(step)
        pool.truncate("a", 30)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    taken_back = pool.page_table(["b"])[0, -1]
    held = pool.plan([("b", 0)]).shard_lens[0, 0] if sharded else 41
    assert pool.k_pages[:, taken_back, : held % 16].isnan().all()
    assert (pool.k_pages[:, taken_back, held % 16 :] == 0).all()


def test_a_gpu_too_many_is_refused_and_the_others_go_on() -> None:
    with pytest.raises(cpattn.CPError, match=r"device='cuda:99' cannot be used on this machine .*; pass one of 'cpu', 'cuda:0'"):
        cpattn.KVPool(8, 4, 1, 2, 8, device="cuda:99")
    assert str(cpattn.KVPool(8, 4, 1, 2, 8, device="cuda").k_pages.device) == "cuda:0"
