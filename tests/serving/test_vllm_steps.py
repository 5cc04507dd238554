"""vLLM's own steps over cpattn: 300 random ones, with vLLM's metadata, slots and attention layer, on each rank of a group.

vLLM comes from its wheel (``make test-engines``); without it these tests are skipped. Its modules are run as they are. What is stood in
for: its configuration, and the group and the forward context of a process, of which each thread has its own here.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from engines import engine_functions
from engines.vllm_modules import import_vllm
from engines.vllm_random_steps import HEAD_DIM, STEPS, Step, steps
from torch import Tensor

import cpattn
from cpattn.integrations import vllm as cpattn_vllm
from cpattn.integrations.vllm import custom
from cpattn.testing import oracle_attention, run_loopback
from cpattn.transports.transport import Transport

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif("CPATTN_ENGINES" not in os.environ, reason="vLLM is not here: make test-engines fetches it")


class OfThread:
    """Stands for what vLLM has once a process: each thread sees the attributes that it has given it."""

    def __init__(self) -> None:
        object.__setattr__(self, "here", threading.local())

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "here"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.here, name, value)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ModuleType]]:
    pytest.importorskip("triton")
    folder = engine_functions.folder_of("vllm")
    modules = import_vllm(folder)
    assert Path(str(modules["backend"].__file__)).is_relative_to(folder)
    # Without a GPU vLLM has no Triton, so that the kernel is taken out of its class, to be run in the interpreter.
    kernel = folder / "vllm/v1/worker/block_table.py", "ComputeSlotMappingKernel.kernel"
    modules["slots"] = engine_functions.take(tmp_path_factory.mktemp("vllm"), kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modules["tensors"], "PIN_MEMORY", False)
        patch.setattr(modules["groups"], "_DCP", OfThread())
        patch.setattr(modules["forward_context"], "_forward_context", OfThread())
        config = OfThread()
        patch.setattr(modules["attention"], "get_current_vllm_config", lambda: config.config)
        patch.setattr(modules["attention"], "thread_config", config, raising=False)
        yield modules


def slots_of(vllm: dict[str, ModuleType], step: Step, rank: int) -> Tensor:
    """By vLLM's own kernel, of all tokens, cached ones as well."""
    begins = torch.tensor([0, *np.cumsum(step.totals)], dtype=torch.int32)
    positions = torch.cat([torch.arange(total) for total in step.totals])
    slots = torch.full((len(positions),), -7, dtype=torch.int64)
    vllm["slots"].kernel[(len(step.batch) + 1,)](
        len(positions),
        len(positions),
        begins,
        positions,
        step.table,
        step.table.stride(0),
        slots,
        KV_CACHE_BLOCK_SIZE=step.block_size,
        TOTAL_CP_WORLD_SIZE=step.size,
        TOTAL_CP_RANK=rank,
        CP_KV_CACHE_INTERLEAVE_SIZE=step.interleave,
        PAD_ID=-1,
        BLOCK_SIZE=256,
    )
    return slots


def pages_with(step: Step, k: Tensor, v: Tensor, slots: Tensor) -> Tensor:
    """A rank's cache that holds the tokens which have a slot, and NaN else."""
    blocks = int(step.table.max()) + 1
    cache = torch.full((blocks * step.block_size, step.kv_heads, 2 * HEAD_DIM), torch.nan)
    cache[slots[slots >= 0]] = torch.cat([k, v], dim=-1)[slots >= 0]
    cache = cache.view(blocks, step.block_size, step.kv_heads, 2 * HEAD_DIM).transpose(1, 2).contiguous()
    return cache if step.cache == "auto" else cache.to(torch.float8_e4m3fn).view(torch.uint8)


def config_of(step: Step) -> SimpleNamespace:
    """As much of vLLM's configuration as is looked at."""
    return SimpleNamespace(
        speculative_config=None,
        model_config=SimpleNamespace(dtype=torch.float32, is_mm_prefix_lm=False),
        parallel_config=SimpleNamespace(
            prefill_context_parallel_size=1,
            decode_context_parallel_size=step.size,
            cp_kv_cache_interleave_size=step.interleave,
        ),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


class Outcome(NamedTuple):
    output: Tensor
    cache: Tensor
    common: Any
    metadata: custom.StepMetadata


@torch.inference_mode()
def run_rank(vllm: dict[str, ModuleType], step: Step, group: Transport, q: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> Outcome:
    """A step as vLLM's second runner makes it: metadata by its ``build_attn_metadata``, and a call of its attention layer."""
    vllm["groups"]._DCP.world_size, vllm["groups"]._DCP.rank_in_group = group.size, group.rank
    vllm["groups"]._DCP.device_group = group
    config, backend = config_of(step), custom.attention_backend()
    vllm["attention"].thread_config.config = config
    asked = dict(step.layer)
    if "sinks" in asked:
        asked["sinks"] = asked["sinks"].chunk(group.size)[group.rank]
    asked["cache_config"] = SimpleNamespace(
        cache_dtype=step.cache, sliding_window=None, kv_cache_dtype_skip_layers=[], enable_prefix_caching=False
    )
    layer = vllm["attention"].Attention(step.heads, HEAD_DIM, HEAD_DIM**-0.5, step.kv_heads, prefix="layer", attn_backend=backend, **asked)
    vllm["checks"].check_attention_cp_compatibility(config)
    spec = vllm["specs"].FullAttentionSpec(step.block_size, num_kv_heads=step.kv_heads, head_size=HEAD_DIM, dtype=torch.float32)
    attention_group = vllm["worker"].AttentionGroup(backend, ["layer"], spec, 0)
    attention_group.create_metadata_builders(config, CPU)
    (builder,) = attention_group.metadata_builders
    seen: list[Any] = []
    build = builder.build

    def build_and_keep(common_prefix_len: int, common: Any) -> Any:
        seen.append(common)
        return build(common_prefix_len, common)

    builder.build = build_and_keep

    new, padding = step.new_rows, step.num_reqs - len(step.batch)
    lengths = torch.tensor([*step.totals, *[0] * padding], dtype=torch.int32)
    extends = torch.tensor([n for _, n in step.batch] + [0] * padding)
    starts = torch.cat([torch.zeros(1), extends.cumsum(0)]).int()
    padded = torch.cat([new, torch.zeros(step.num_tokens - len(new), dtype=torch.int64)])
    new_slots = torch.full((step.num_tokens,), -1)
    new_slots[: len(new)] = slots[new]
    local = vllm["backend_utils"].get_dcp_local_seq_lens(lengths, step.size, group.rank, step.interleave)
    metadata = vllm["steps"].build_attn_metadata(
        [[attention_group]],
        step.num_reqs,
        step.num_tokens,
        starts,
        starts,
        int(extends.max()),
        lengths,
        int(lengths.max()),
        [step.table],
        new_slots[None],
        SimpleNamespace(kv_cache_groups=[None]),
        seq_lens_cpu_upper_bound=lengths,
        dcp_local_seq_lens=local if step.size > 1 else None,
    )
    cached = slots.clone()
    cached[new] = -1
    layer.kv_cache = pages_with(step, k, v, cached)
    context = vllm["forward_context"]._forward_context
    context.attn_metadata, context.no_compile_layers, context.slot_mapping = metadata, {"layer": layer}, {"layer": new_slots}
    mine = q[:, group.rank * step.heads : (group.rank + 1) * step.heads]
    output = layer(mine[padded].flatten(1), k[padded].flatten(1), v[padded].flatten(1))
    return Outcome(output.view(-1, step.heads, HEAD_DIM), layer.kv_cache, seen[0], metadata["layer"])


def test_steps_are_exact_on_every_rank(vllm: dict[str, ModuleType]) -> None:
    """What vLLM's layer returns, what is in its pages then, and its metadata from ours."""
    torch.manual_seed(0)
    for step in steps():
        total = sum(step.totals)
        q = torch.randn(total, step.size * step.heads, HEAD_DIM)
        k, v = torch.randn(2, total, step.kv_heads, HEAD_DIM).unbind()
        slots = [slots_of(vllm, step, rank) for rank in range(step.size)]

        def program(group: Transport, step: Step = step, q: Tensor = q, k: Tensor = k, v: Tensor = v, slots: Any = slots) -> Outcome:
            return run_rank(vllm, step, group, q, k, v, slots[group.rank])

        outcomes = run_loopback(program, step.size)
        seen_k, seen_v = (x if step.cache == "auto" else x.to(torch.float8_e4m3fn).float() for x in (k, v))
        expected, _ = oracle_attention(
            q,
            seen_k,
            seen_v,
            [(0, length) for length in step.totals],
            window=step.layer.get("per_layer_sliding_window"),
            softcap=step.layer.get("logits_soft_cap"),
            sinks=step.layer.get("sinks"),
        )
        new = step.new_rows
        out = torch.cat([outcome.output[: len(new)] for outcome in outcomes], dim=1)
        torch.testing.assert_close(out, expected[new].float())
        for rank, outcome in enumerate(outcomes):
            torch.testing.assert_close(outcome.cache, pages_with(step, k, v, slots[rank]), rtol=0, atol=0, equal_nan=True)
            check_there_and_back(vllm, step, rank, outcome)


def check_there_and_back(vllm: dict[str, ModuleType], step: Step, rank: int, outcome: Outcome) -> None:
    common, (meta, block_table, _) = outcome.common, outcome.metadata
    padding = [(0, 0)] * (step.num_reqs - len(step.batch))
    assert meta.plan.batch == (*step.batch, *padding)
    assert common.compute_num_computed_tokens().tolist() == meta.plan.prefix_lens.tolist()
    shorter = common.unpadded(sum(n for _, n in step.batch), len(step.batch))
    assert cpattn_vllm.plan_of(shorter, step.size, step.interleave).batch == tuple(step.batch)
    fields = cpattn_vllm.common_fields(meta, block_table, step.block_size, num_tokens=step.num_tokens, num_reqs=step.num_reqs)
    ours = vllm["backend"].CommonAttentionMetadata(**fields)
    for name in fields:
        mine, theirs = getattr(ours, name), getattr(common, name)
        if name != "positions":  # which vLLM gives to some models alone
            assert mine.tolist() == theirs.tolist() if isinstance(mine, Tensor) else mine == theirs, (step, name)
            assert not isinstance(mine, Tensor) or mine.dtype == theirs.dtype, name


def test_prefill_chunks_are_those_of_vllm(vllm: dict[str, ModuleType]) -> None:
    """Its partition of a step over ranks of prefill context parallelism: rows, their order, and where each is written."""
    rng = np.random.default_rng(1)
    for _ in range(STEPS):
        size, block_size = int(rng.choice([2, 3, 4, 8])), int(rng.choice([1, 4, 16]))
        count = int(rng.integers(1, 7))
        decodes = int(rng.integers(0, count + 1))
        lengths = [1] * decodes + [
            int(rng.choice([1, 2, int(rng.integers(1, 20)), int(rng.integers(1, 200))])) for _ in range(count - decodes)
        ]
        batch = [(int(rng.integers(0, 40)), n) for n in lengths]
        prefilling = np.arange(count) >= decodes
        plan = cpattn.plan(batch, size, partition=cpattn_vllm.prefill_chunks(prefilling))
        blocks = -(-int(plan.total_lens.max()) // block_size)
        table = torch.from_numpy(rng.permutation(count * blocks).reshape(count, blocks).astype(np.int32))
        starts = np.cumsum([0, *lengths])
        positions = np.concatenate([np.arange(p, p + n) for p, n in batch])
        request = np.repeat(np.arange(count), lengths)
        slots = table[request, positions // block_size].long() * block_size + torch.from_numpy(positions % block_size)

        for rank in range(size):
            manager = vllm["pcp"].PCPManager(size, rank, CPU, shard_decode_requests=True)
            scheduled, computed = np.array(lengths), np.array([p for p, _ in batch])
            segments, tokens = manager._build_batch_layout(scheduled, computed, prefilling, starts)
            assert tuple(tokens) == plan.rank_tokens
            meta = plan.metadata(rank)
            assert manager._hidden_restore_idx.tolist() == meta.restore_index.tolist()
            slices = [segment.global_batch_slice for segment in segments[rank]]
            rows = np.array([row for part in slices for row in range(part.start, part.stop)], dtype=np.int64)
            assert meta.position_ids[: tokens[rank]].tolist() == positions[rows].tolist()
            gathered = manager._convert_to_gathered_slot_mappings(slots[None])[0]
            assert gathered.tolist() == cpattn.slot_mapping(meta, table, block_size).tolist()


def test_custom_is_cpattn(vllm: dict[str, ModuleType]) -> None:
    """As vLLM chooses a backend, and asks it what it can do."""
    registry = vllm["registry"]
    cpattn_vllm.register()
    backend = registry.AttentionBackendEnum.CUSTOM.get_class()
    assert backend is custom.attention_backend()
    assert registry.AttentionBackendEnum[backend.get_name()] is registry.AttentionBackendEnum.CUSTOM
    asked: dict[str, Any] = {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": 16,
        "use_mla": False,
        "has_sink": True,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": None,
        "attn_type": "decoder",
        "has_sliding_window": True,
        "use_dcp": True,
    }
    assert backend.validate_configuration(**asked) == []
    for name, value, reason in [
        ("use_mla", True, "MLA not supported"),
        ("use_pcp", True, "PCP not supported"),
        ("kv_cache_dtype", "nvfp4", "kv_cache_dtype not supported"),
        ("attn_type", "encoder_only", "attention type encoder_only not supported"),
        ("use_non_causal", True, "non-causal attention not supported"),
        ("use_rswa", True, "R-SWA not supported"),
        ("use_mm_prefix", True, "partial multimodal token full attention not supported"),
    ]:
        assert backend.validate_configuration(**{**asked, name: value}) == [reason]


def test_prefill_context_parallelism_is_for_mla_alone(vllm: dict[str, ModuleType]) -> None:
    """What docs/vllm.md says of it: should that change, there is more to do here."""
    config = SimpleNamespace(parallel_config=SimpleNamespace(prefill_context_parallel_size=2), model_config=SimpleNamespace(use_mla=False))
    with pytest.raises(NotImplementedError, match="MLA models only"):
        vllm["pcp"].PCPManager.validate_config(config, supports_mm_inputs=False)
