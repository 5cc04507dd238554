"""A call in which some ranks raise, what the others may get of it, and the calls after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from inputs.cases import PACKED, AttentionCase
from torch import Tensor

import cpattn
from cpattn.call.arguments import StrategyChoice
from programs.fault_injection import Injected, fault_at


@dataclass
class Faults:
    """The line at which each failing rank raises."""

    lines: dict[int, int]
    make: Callable[[str], BaseException] = Injected


def attend_with_faults(
    case: AttentionCase,
    plan: cpattn.Plan,
    group: cpattn.Communicator | None,
    rank: int,
    strategy: StrategyChoice,
    backend: Any,
    faults: Faults,
) -> tuple[Tensor, Tensor] | None:
    """This rank's call: its local out and LSE, or None where it raised what was injected."""
    meta = plan.metadata(rank, case.device)
    q, k, v = (cpattn.shard(x, meta) for x in (case.q, case.k, case.v))
    pages = None if case.cache in PACKED else case.pages(plan, rank)

    def call() -> tuple[Tensor, Tensor]:
        return cpattn.cp_attention(  # type: ignore[call-overload, no-any-return, misc]
            q,
            k,
            None if case.v_in_k else v,
            meta,
            group=group,
            v_dim=v.shape[2] if case.v_in_k else None,
            kv_cache=case.packed(plan, rank) if pages is None else pages.cache,
            strategy=strategy,
            backend=backend,
            return_lse=True,
            overlap=case.overlap,
            **case.options,
        )

    result: tuple[Tensor, Tensor] | None = with_fault(call, rank, faults)
    return result


def with_fault(call: Callable[[], Any], rank: int, faults: Faults) -> Any:
    """What the call returns, or None where it raised what was injected."""
    if rank not in faults.lines:
        return call()
    fault = faults.make(f"injected on rank {rank}")
    with fault_at(faults.lines[rank], fault) as point:
        try:
            result = call()
        except BaseException as error:
            if error is not fault:
                raise
            return None
    # Where the call had fewer lines nothing was raised.
    assert not point.was_raised
    return result


def check_partly_failed(
    case: AttentionCase, plan: cpattn.Plan, strategy: StrategyChoice, results: list[tuple[Tensor, Tensor] | None]
) -> None:
    """What the ranks that did not raise may have got: each row is right, or NaN with LSE NaN; never anything else."""
    expected, expected_lse = (x.to("cpu", torch.float64) for x in case.expected)
    failed = {rank for rank, result in enumerate(results) if result is None}
    for rank, result in enumerate(results):
        if result is None:
            continue
        meta = plan.metadata(rank)
        out, lse = (x[: meta.num_tokens].to("cpu", torch.float64) for x in result)
        index = meta.token_index[: meta.num_tokens].long()
        is_nan = out.isnan().any(dim=-1)
        assert torch.equal(is_nan, out.isnan().all(dim=-1)), "a row is NaN as a whole or not at all"
        assert torch.equal(is_nan, lse.isnan()), "NaN in the result and in its LSE go together"
        right, right_lse = expected[index], expected_lse[index]
        size = 0.02 if case.dtype in (torch.bfloat16, torch.float16) else 1e-4
        assert torch.allclose(out[~is_nan], right[~is_nan], rtol=size, atol=size), "what is not NaN is right"
        assert torch.allclose(lse[~is_nan], right_lse[~is_nan], rtol=size, atol=size)
        new_keys_alone = strategy in ("all_gather", "ring") and case.cache not in ("sharded", "ranked", "striped")
        if new_keys_alone and not (case.v_in_k and case.v.shape[2] == case.k.shape[2]):
            depends = _sees_tokens_of(plan, failed)[index]
            assert not is_nan[~depends].any(), "a query that sees no key of a failed rank is right"
        # Padding is what it always is, or was spoilt as well.
        padding, padding_lse = (x[meta.num_tokens :] for x in result)
        assert ((padding == 0) | padding.isnan()).all()
        assert ((padding_lse == -torch.inf) | padding_lse.isnan()).all()


def _sees_tokens_of(plan: cpattn.Plan, ranks: set[int]) -> Tensor:
    """Which tokens of the batch see a new token that one of these ranks owns."""
    sees = torch.zeros(plan.num_tokens, dtype=torch.bool)
    begins = plan.extend_lens.cumsum() - plan.extend_lens
    for chunk in plan.chunks:
        if chunk.rank in ranks:
            begin = int(begins[chunk.request])
            sees[begin + chunk.start : begin + int(plan.extend_lens[chunk.request])] = True
    return sees
