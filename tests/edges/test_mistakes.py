"""The ten mistakes that a new user is likeliest to make, each made as they would, and what they are told.

Where the library cannot see a mistake, that is tested as well, so that docs/troubleshooting.md says what is so.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cpattn
from cpattn.testing import oracle_attention, relative_rmse, run_loopback

ROOT = Path(__file__).parents[2]
BATCH = [(5, 40), (0, 23)]
TOKENS, PREFIX = 63, 5


def tensors(tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of all new tokens, as a model would make them from its hidden states."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(tokens, heads, 16, generator=generator) for heads in (4, 2, 2))  # type: ignore[return-value]


def cache() -> cpattn.PackedKV:
    return cpattn.PackedKV(torch.ones(PREFIX, 2, 16), torch.ones(PREFIX, 2, 16))


def rank_1_of_2(batch: list[tuple[int, int]] = BATCH) -> cpattn.CPMetadata:
    return cpattn.build_metadata(batch, cp_size=2, cp_rank=1)


def group_of(size: int, rank: int) -> cpattn.Communicator:
    return cpattn.LoopbackGroup(size, timeout=1.0).communicator(rank)


# 1. Unsharded q.


def test_q_is_not_sharded() -> None:
    q, k, v = tensors()
    message = r"q has 63 rows, but this rank's metadata has 32 \(rank 1 of 2\); shard the input with cpattn.shard\(x, meta\)"
    with pytest.raises(cpattn.RowCountError, match=message):
        cpattn.cp_attention(q, k, v, rank_1_of_2(), group=group_of(2, 1), kv_cache=cache())


def test_only_q_is_sharded() -> None:
    q, k, v = tensors()
    meta = rank_1_of_2()
    with pytest.raises(cpattn.RowCountError, match=r"k has 63 rows, .*; shard the input"):
        cpattn.cp_attention(cpattn.shard(q, meta), k, v, meta, group=group_of(2, 1), kv_cache=cache())


def test_q_has_the_batch_axis_of_other_libraries() -> None:
    q, k, v = (x[None] for x in tensors())
    with pytest.raises(cpattn.TensorMismatchError, match=r"pass a tensor \[rows, heads, head_dim\], without a batch axis"):
        cpattn.cp_attention(q, k, v, rank_1_of_2(), group=group_of(2, 1), kv_cache=cache())


# 2. An output that was not gathered, used as if it were whole. cpattn sees it when it comes back.


def test_the_local_output_is_sharded_again() -> None:
    meta = rank_1_of_2()
    message = (
        r"x has shape \(32, 4, 16\), but the batch has 63 new tokens .*as many rows as this rank: .*cpattn.unshard has yet to make whole"
    )
    with pytest.raises(cpattn.RowCountError, match=message):
        cpattn.shard(torch.zeros(meta.rows, 4, 16), meta)


def test_a_whole_output_is_unsharded() -> None:
    message = r"x has 63 rows, .* has 32 .*; unshard takes this rank's rows.*x has all tokens of the batch already"
    with pytest.raises(cpattn.RowCountError, match=message):
        cpattn.unshard(torch.zeros(TOKENS, 4, 16), rank_1_of_2(), group=group_of(2, 1))


def test_the_local_output_meets_whole_tensors() -> None:
    """torch sees this one, by the shapes: a residual of the whole batch has more rows than a rank."""
    meta = rank_1_of_2()
    with pytest.raises(RuntimeError, match=r"size of tensor a \(63\) must match the size of tensor b \(32\)"):
        torch.zeros(TOKENS, 64) + torch.zeros(meta.rows, 64)


# 3. Positions that were not sharded.


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """RoPE (arXiv:2104.09864) in the half-split form."""
    half = x.shape[-1] // 2
    angles = positions[:, None].float() * 1e4 ** (-torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)


def test_whole_positions_do_not_fit_the_local_rows() -> None:
    meta = rank_1_of_2()
    q = cpattn.shard(tensors()[0], meta)
    with pytest.raises(RuntimeError, match=r"must match the size of tensor b \(63\)"):
        rotate(q, torch.arange(TOKENS))
    rotate(q, meta.position_ids)


def test_local_positions_are_not_seen_but_a_comparison_with_the_oracle_finds_them() -> None:
    """``arange(rows)`` has the right length. No message can come of it, so troubleshooting says to compare once."""
    q, k, v = tensors(40)
    batch = [(0, 40)]
    whole = torch.arange(40)
    expected, _ = oracle_attention(rotate(q, whole), rotate(k, whole), v, batch)

    def error(local_positions: bool) -> float:
        def program(c: cpattn.Communicator) -> Tensor:
            meta = cpattn.build_metadata(batch, 2, c.rank)
            positions = torch.arange(meta.rows) if local_positions else meta.position_ids
            q_, k_, v_ = (cpattn.shard(x, meta) for x in (q, k, v))
            return cpattn.unshard(cpattn.cp_attention(rotate(q_, positions), rotate(k_, positions), v_, meta, group=c), meta, group=c)

        return relative_rmse(run_loopback(program, 2)[0], expected)

    assert error(local_positions=False) < 1e-6
    assert error(local_positions=True) > 0.01


# 4. and 6. The wrong group, and a cp_size that is not the group's.


def test_the_group_is_another_one_in_which_this_process_has_another_rank() -> None:
    q, k, v = (cpattn.shard(x, rank_1_of_2()) for x in tensors())
    message = r"this process is rank 0 of the group, but the metadata is that of cp_rank 1; build the metadata with the rank within the"
    with pytest.raises(cpattn.GroupError, match=message):
        cpattn.cp_attention(q, k, v, rank_1_of_2(), group=group_of(2, 0), kv_cache=cache())


@pytest.mark.parametrize("size", [1, 4])
def test_cp_size_is_not_that_of_the_group(size: int) -> None:
    meta = rank_1_of_2()
    q, k, v = (cpattn.shard(x, meta) for x in tensors())
    message = rf"the group has {size} ranks, but the plan has cp_size=2; pass the context-parallel group, or plan for its size"
    with pytest.raises(cpattn.GroupError, match=message):
        cpattn.cp_attention(q, k, v, meta, group=group_of(size, 0), kv_cache=cache())
    with pytest.raises(cpattn.GroupError, match=message):
        cpattn.unshard(q, meta, group=group_of(size, 0))


def test_the_group_is_a_number() -> None:
    with pytest.raises(cpattn.GroupError, match=r"group is a int; pass a ProcessGroup this process belongs to, a DeviceMesh axis or"):
        cpattn.unshard(torch.zeros(32, 4), rank_1_of_2(), group=1)  # type: ignore[arg-type]


def test_the_rank_is_the_global_one() -> None:
    with pytest.raises(cpattn.RankError, match=r"cp_rank=5; it must be an integer from 0 to 1 \(the plan's cp_size is 2\)"):
        cpattn.build_metadata(BATCH, cp_size=2, cp_rank=5)


# 5. Launched without torchrun.


def _said_alone() -> str:
    meta, q = cpattn.build_metadata([(0, 8)], cp_size=2, cp_rank=0), torch.zeros(4, 1, 8)
    with pytest.raises(cpattn.GroupError) as raised:
        cpattn.cp_attention(q, q, q, meta)
    return str(raised.value)


def test_without_torchrun_the_message_is_the_launch_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert _said_alone() == (
        "the plan has 2 ranks, but there is no process group: launch with torchrun --nproc-per-node 2 and "
        "call torch.distributed.init_process_group(), or pass group="
    )


def test_with_torchrun_but_without_a_group_only_the_call_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert "no process group: call torch.distributed.init_process_group(), or pass group=" in _said_alone()


# 7. A missing extra.

_WITHOUT_EXTRAS = """
import importlib, sys
from importlib.machinery import PathFinder
found = PathFinder.find_spec
def missing(name, path=None, target=None):
    extras = {"flash_attn", "triton", "transformers", "matplotlib"}
    return None if name.split(".")[0] in extras else found(name, path, target)
PathFinder.find_spec = missing  # as where they are not installed: also torch asks, with find_spec
import cpattn
for backend in ("flash_attn4", "flash_attn2", "triton"):
    print(cpattn.BACKENDS[backend].unavailable())
import cpattn.viz
for use in (
    lambda: importlib.import_module("cpattn.integrations.transformers"),
    lambda: cpattn.viz.draw_plan_picture(cpattn.plan([(0, 9)], 2), "x.svg"),
):
    try:
        use()
    except (ImportError, cpattn.CPError) as error:
        print(error)
"""


def test_a_missing_extra_is_named_with_its_install_command() -> None:
    done = subprocess.run([sys.executable, "-c", _WITHOUT_EXTRAS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = [
        "flash_attn.cute is not installed; pip install 'cpattn[fa4]'",
        "is not installed; pip install 'cpattn[fa2]'",
        "triton is not installed; pip install 'cpattn[triton]'",
        "needs Hugging Face transformers: pip install 'cpattn[transformers]'",
        "pip install 'cpattn[viz]'",
    ]
    for line, message in zip(done.stdout.splitlines(), expected, strict=True):
        assert message in line


# 8. CPU tensors with a GPU backend.


@pytest.mark.parametrize("backend", ["flash_attn4", "flash_attn3", "flash_attn2", "torch_flash", "triton"])
def test_cpu_tensors_with_a_gpu_backend(backend: str) -> None:
    meta = rank_1_of_2()
    q, k, v = (cpattn.shard(x, meta) for x in tensors())
    message = rf"backend='{backend}' cannot serve this call: it runs on cuda tensors, not on cpu ones; 'cpu', 'reference' could"
    with pytest.raises(cpattn.UnsupportedError, match=message):
        cpattn.cp_attention(q, k, v, meta, group=group_of(2, 1), kv_cache=cache(), backend=backend)


def test_tensors_and_metadata_on_two_devices() -> None:
    meta = rank_1_of_2()
    q, k, v = (cpattn.shard(x, meta).to("meta") for x in tensors())
    with pytest.raises(
        cpattn.TensorMismatchError, match=r"q is on meta, but the metadata is on cpu; a meta tensor has a shape but no data"
    ):
        cpattn.cp_attention(q, k, v, meta, group=group_of(2, 1), kv_cache=cache())
    # Metadata on a GPU, as far as a check can tell.
    meta.device = torch.device("cuda:0")
    message = r"x is on cpu, but the metadata is on cuda:0; build it where the tensors are: plan.metadata\(cp_rank, device='cpu'\)"
    with pytest.raises(cpattn.TensorMismatchError, match=message):
        cpattn.shard(tensors()[0], meta)


# 9. The prefix is forgotten: in the call, or in the batch.


def test_the_cache_is_not_passed() -> None:
    meta = rank_1_of_2()
    q, k, v = (cpattn.shard(x, meta) for x in tensors())
    message = r"the batch has 5 prefix tokens, but kv_cache is None; pass kv_cache=PackedKV\(k, v\) with those tokens, or PagedKV"
    with pytest.raises(cpattn.PrefixError, match=message):
        cpattn.cp_attention(q, k, v, meta, group=group_of(2, 1))


def test_the_batch_does_not_speak_of_the_prefix() -> None:
    meta = rank_1_of_2([(0, 40), (0, 23)])
    q, k, v = (cpattn.shard(x, meta) for x in tensors())
    with pytest.raises(cpattn.PrefixError, match=r"kv_cache.k has 5 rows, but the batch has 0 prefix tokens .*; pack the prefix of every"):
        cpattn.cp_attention(q, k, v, meta, group=group_of(2, 1), kv_cache=cache())


# 10. The metadata of yesterday's batch.


def test_metadata_of_another_batch_has_another_number_of_rows() -> None:
    q, k, v = (cpattn.shard(x, rank_1_of_2()) for x in tensors())
    with pytest.raises(cpattn.RowCountError, match=r"q has 32 rows, but this rank's metadata has 4 .*, and let meta be that of this batch"):
        cpattn.cp_attention(q, k, v, rank_1_of_2([(0, 7)]), group=group_of(2, 1))


def test_metadata_of_another_batch_of_as_many_tokens_is_found_by_check() -> None:
    def program(c: cpattn.Communicator) -> str:
        # Rank 0 forgot to build its own anew: two requests in another order.
        meta = cpattn.build_metadata(BATCH if c.rank else BATCH[::-1], 2, c.rank)
        q, k, v = (cpattn.shard(x, meta) for x in tensors())
        with pytest.raises(cpattn.DisagreementError) as raised:
            cpattn.cp_attention(q, k, v, meta, group=c, kv_cache=cache(), check=True)
        return str(raised.value)

    for message in run_loopback(program, 2):
        assert re.search(r"the ranks disagree on the plan: .*; build the metadata from the same batch and options on every rank", message)
