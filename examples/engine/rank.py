"""What each process runs: the engine's loop, and the model's own ``generate`` to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

import cpattn
from cpattn.attention.backend import AttentionOptions
from engine.scheduler import Scheduler, Step
from engine.shape import ModelShape
from engine.workload import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# In a row, before the engine gives up.
MOST_FAILURES = 3


@dataclass(frozen=True)
class EngineOptions:
    """Attributes:
    shape, seed: of the model.
    budget: new tokens of a step.
    page_size, num_pages: of each rank's pool.
    sharded: whether each rank keeps its own tokens only, or all.
    fail_step: the step from which on the last rank's kernel is one that raises once, to show what becomes of it; None for never.
    device: "cpu", or "cuda" for each process's own GPU.
    """

    shape: ModelShape
    seed: int
    budget: int
    page_size: int
    num_pages: int
    sharded: bool
    fail_step: int | None = None
    device: str = "cpu"


class FailsOnce:
    """A kernel that raises at its third launch, in the middle of a step, as one does that has run out of memory."""

    def __init__(self) -> None:
        self.launches = 0

    @property
    def has_failed(self) -> bool:
        return self.launches == 3

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: cpattn.RaggedRows, **options: Any) -> tuple[Tensor, Tensor]:
        self.launches += 1
        if self.has_failed:
            raise RuntimeError("a kernel failed, as the example asked for")
        out_dtype = options.pop("out_dtype")
        return cpattn.BACKENDS["reference"].run(q, k, v, rows, AttentionOptions(**options), out_dtype)


@dataclass(frozen=True)
class Served:
    """One request's way through the engine.

    Attributes:
        prompt, answer: token ids.
        top: the two largest logits of each token of the answer, ``(largest, next)``.
        reused: whose cached tokens its prompt began with, and how many; None if there were none.
        chunks: the steps that computed its prompt.
        preempted: how often it was begun again.
    """

    name: str
    prompt: list[int]
    answer: list[int]
    top: list[tuple[float, float]]
    reused: tuple[str, int] | None
    chunks: int
    preempted: int


@dataclass(frozen=True)
class Report:
    """What a rank returns, the same on every rank: the requests, and what happened on the way.

    Attributes:
        steps, mixed_steps: forward passes, and those of them with decodes and prefills together.
        failed_steps: that were taken back and planned again.
        evictions: of finished requests whose pages were needed.
        waits: steps in which work waited for pages.
        cache_bytes: of this rank's pages.
    """

    served: list[Served]
    steps: int
    mixed_steps: int
    failed_steps: int
    evictions: int
    waits: int
    cache_bytes: int


@torch.inference_mode()
def serve(options: EngineOptions, requests: list[Request]) -> Report:
    """Serves the requests together with the other ranks of the default group, each of which makes this call alike."""
    from engine.model import build_model, use_pool

    rank, cp_size = dist.get_rank(), dist.get_world_size()
    shape = options.shape
    model = build_model(shape, options.seed).to(options.device)
    use_pool(model)
    pool = cpattn.KVPool(
        options.num_pages,
        options.page_size,
        shape.num_hidden_layers,
        shape.num_key_value_heads,
        shape.head_dim,
        device=options.device,
        cp_size=cp_size,
        cp_rank=rank,
        sharded=options.sharded,
    )
    scheduler = Scheduler(pool, requests, options.budget)
    top: dict[str, list[tuple[float, float]]] = {request.name: [] for request in requests}
    steps = mixed_steps = failed_steps = failures = 0
    odd = FailsOnce() if options.fail_step is not None and rank == cp_size - 1 else None
    for number, step in enumerate(scheduler.steps()):
        is_odd = odd is not None and number >= (options.fail_step or 0) and not odd.has_failed
        try:
            tokens, pairs = run_step(model, pool, step, rank, odd if is_odd else "auto")
        except cpattn.GroupError:
            raise  # the ranks are out of step, or one is gone: start them anew
        except Exception:
            failures += 1
            if failures == MOST_FAILURES:
                raise
            scheduler.take_back(step)
            failed_steps += 1
            continue
        failures = 0
        scheduler.append(step, tokens)
        for (state, _), pair in zip(step.work, pairs, strict=True):
            if pair is not None:
                top[state.name].append(pair)
        steps += 1
        mixed_steps += len({count > 1 for _, count in step.work}) == 2
    scheduler.release_all()
    if pool.free_pages != options.num_pages:
        raise RuntimeError(f"{options.num_pages - pool.free_pages} pages were not given back")
    served = [
        Served(state.name, state.tokens[: state.prompt_len], state.answer, top[state.name], state.reused, state.chunks, state.preempted)
        for state in scheduler.states.values()
    ]
    assert pool.v_pages is not None
    return Report(served, steps, mixed_steps, failed_steps, scheduler.evictions, scheduler.waits, pool.k_pages.nbytes + pool.v_pages.nbytes)


def run_step(
    model: PreTrainedModel, pool: cpattn.KVPool, step: Step, rank: int, backend: Any = "auto"
) -> tuple[list[int | None], list[tuple[float, float] | None]]:
    """One forward pass over this rank's share of the step's tokens.

    Returns, for each request of the step, its next token and its two largest logits; None where its prompt goes on.
    """
    from engine.model import PoolStep

    device = pool.k_pages.device
    meta = step.plan.metadata(rank, device)
    page_table = pool.page_table([state.name for state, _ in step.work])
    input_ids = cpattn.shard(torch.tensor(step.token_ids, device=device), meta)
    hidden = model.model(
        input_ids=input_ids[None],
        position_ids=meta.position_ids[None],
        use_cache=False,
        pool_step=PoolStep(pool, meta, page_table, backend),
    ).last_hidden_state[0]
    # Logits only where a request's last token lies; what travels is two numbers a row, and every rank reads the same.
    is_last = torch.isin(meta.token_index, torch.tensor([row for row in step.last_rows if row is not None], device=device))
    top = model.lm_head(hidden[is_last]).topk(2)
    local_tokens = torch.zeros(meta.rows, dtype=torch.int64, device=device)
    local_tokens[is_last] = top.indices[:, 0]
    local_top = torch.zeros(meta.rows, 2, device=device)
    local_top[is_last] = top.values
    tokens, pairs = (cpattn.unshard(x, meta, check=True).tolist() for x in (local_tokens, local_top))
    return (
        [None if row is None else tokens[row] for row in step.last_rows],
        [None if row is None else tuple(pairs[row]) for row in step.last_rows],
    )


@dataclass(frozen=True)
class Expected:
    """What the model itself makes of a prompt.

    Attributes:
        answer: token ids.
        top: the two largest logits of each token of the answer.
        top_in_one_pass: the same logits from one forward pass over prompt and answer, which rounds otherwise: how far
            apart two right results may be.
    """

    answer: list[int]
    top: list[tuple[float, float]]
    top_in_one_pass: list[tuple[float, float]]


@torch.inference_mode()
def generate(options: EngineOptions, prompts: Sequence[tuple[Sequence[int], int]]) -> dict[int, Expected]:
    """The model's own greedy answers, one request at a time, without anything of cpattn; each rank does its share alone.

    Args:
        prompts: token ids, and how many tokens to generate.

    Returns:
        By number of the prompt.
    """
    from engine.model import build_model

    model = build_model(options.shape, options.seed).to(options.device)
    expected = {}
    for number in range(dist.get_rank(), len(prompts), dist.get_world_size()):
        prompt, new_tokens = prompts[number]
        ids = torch.tensor([list(prompt)], device=options.device)
        result = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        in_one_pass = model(result.sequences[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
        expected[number] = Expected(result.sequences[0, len(prompt) :].tolist(), _top(torch.cat(result.logits)), _top(in_one_pass))
    return expected


def _top(logits: torch.Tensor) -> list[tuple[float, float]]:
    return [(first, second) for first, second in logits.topk(2).values.tolist()]
