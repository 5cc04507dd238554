"""nano-vllm, a whole engine that is not ours, with the context of its prompts split over ranks by cpattn.

python examples/nano_vllm.py

It compares every token with that of nano-vllm as it is, on one device; the exit code is 1 if any differs.
``benchmarks/bench_nano_vllm.py`` measures both, and nano-vllm's own tensor parallelism.

Needs ``pip install --no-deps nano-vllm-fork==20260210 xxhash``, transformers and triton; on GPUs also flash-attn, or FlashAttention-3
in its place. No download: the model is a Qwen3 with random weights. On CPUs every token is equal; on two GPUs in bf16 tokens differ where
the two largest logits are as near to each other as those of both engines are.

nano-vllm's scheduler, block manager, prefix cache, sampler and CUDA graphs are its own, as is how rank 0 drives the others. Replaced
are the inputs of a prefill, the attention, and which rows the last layer takes, all in this file. Every rank has the whole model and
all pages. A prefill of few tokens, and every decode, is computed by each rank for itself, as nano-vllm does on one GPU. That fills
the pages of all ranks, and nothing has to be sent.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from nano_engine import stand_ins
from nano_engine.check import compare, requests_to_check
from nano_engine.random_model import SMALL, Shape, write_model
from nano_engine.repairs import RepairedRunner, check_interface, choose_port, repair
from nano_engine.serve import Steps, serve
from nanovllm import LLM
from nanovllm.engine import llm_engine
from nanovllm.layers import embed_head, linear
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.models import qwen3
from nanovllm.utils.context import get_context
from torch import Tensor

import cpattn

check_interface()
repair()  # in the processes of the other ranks, too, which import this file

# From how many new tokens on a prefill is split. On two H100 one of 16k took 75 ms in place of 89 on one, and one of 64k 498 in place of
# 884. Of 8k and less it is the host's time, which has more to do.
SPLIT_FROM = 12288


class Split(NamedTuple):
    """A step whose rows are spread over the ranks; a part of nano-vllm's context."""

    meta: cpattn.CPMetadata
    page_table: Tensor


def split_of_step() -> Split | None:
    """None where every rank computes all rows."""
    return getattr(get_context(), "split", None)


class ContextParallelAttention(Attention):  # type: ignore[misc]
    """Writes new keys and values to the pages of all ranks, and attends to them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        split = split_of_step()
        if split is None:
            return super().forward(q, k, v)  # type: ignore[no-any-return]
        pages = cpattn.PagedKV(self.k_cache, self.v_cache, split.page_table)
        return cpattn.cp_attention(q, k, v, split.meta, kv_cache=pages, scale=self.scale)


class ContextParallelHead(ParallelLMHead):  # type: ignore[misc]
    """Brings the last row of each request to all ranks, from whichever has it."""

    def forward(self, x: Tensor) -> Tensor:
        split = split_of_step()
        if split is None:
            return super().forward(x)  # type: ignore[no-any-return]
        rows = split.meta.rows
        place = split.meta.restore_index[get_context().cu_seqlens_q[1:] - 1]
        is_here = place // rows == split.meta.cp_rank
        last = torch.where(is_here[:, None], x[place % rows], 0)
        dist.all_reduce(last)  # of one row and zeros, so it is exact
        return torch.nn.functional.linear(last, self.weight)


class ContextParallelRunner(RepairedRunner):
    """nano-vllm's runner of a rank, whose ranks share the tokens of a prefill in place of the weights."""

    def __init__(self, config: Any, rank: int, event: Any) -> None:
        self.split_from = SPLIT_FROM
        alone = SimpleNamespace(get_rank=lambda: 0, get_world_size=lambda: 1)
        with ExitStack() as replaced:
            for module in (linear, embed_head, qwen3):
                replaced.enter_context(patch.object(module, "dist", alone))
            replaced.enter_context(patch.object(qwen3, "Attention", ContextParallelAttention))
            replaced.enter_context(patch.object(qwen3, "ParallelLMHead", ContextParallelHead))
            super().__init__(config, rank, event)

    def set_split_from(self, tokens: int) -> None:
        self.split_from = tokens

    def allocate_kv_cache(self) -> None:
        # It divides the heads by world_size, and here every rank has all.
        self.world_size, ranks = 1, self.world_size
        super().allocate_kv_cache()
        self.world_size = ranks

    def prepare_prefill(self, seqs: list[Any]) -> tuple[Tensor, Tensor]:
        input_ids, positions = super().prepare_prefill(seqs)
        if len(input_ids) < self.split_from or not seqs[0].block_table:  # without one it warms up
            return input_ids, positions
        batch = [(seq.num_cached_tokens, len(seq) - seq.num_cached_tokens) for seq in seqs]
        meta = cpattn.plan(batch, self.world_size, partition="auto").metadata(self.rank, input_ids.device)
        get_context().split = Split(meta, self.prepare_block_tables(seqs))
        return cpattn.shard(input_ids, meta), meta.position_ids

    def run(self, seqs: list[Any], is_prefill: bool) -> list[int] | None:
        tokens: list[int] = []
        for part in in_order_of_prefixes(seqs) if is_prefill else [seqs]:
            tokens += super().run(part, is_prefill) or []
        if self.rank != 0 and not stand_ins.ON_CPU:
            # Rank 0 waits for its tokens. Others must as well before the buffers that are on their way to the GPU are filled anew.
            torch.cuda.synchronize()
        return tokens if self.rank == 0 else None

    def write_shm(self, method_name: str, *args: Any) -> None:
        # A step that sends nothing does not keep ranks together: the last message may not have been read yet.
        while any(event.is_set() for event in self.event):
            if len(active_children()) < len(self.event):
                raise RuntimeError("the process of another rank has ended; what it printed says why")
            time.sleep(0)
        super().write_shm(method_name, *args)


def in_order_of_prefixes(seqs: list[Any]) -> Iterator[list[Any]]:
    """Splits a step where a request's cached prefix is computed by one before it: a plan's prefixes have to be in the pages."""
    part: list[Any] = []
    written: set[int] = set()
    for seq in seqs:
        if written.intersection(seq.block_table[: seq.num_cached_blocks]):
            yield part
            part, written = [], set()
        part.append(seq)
        written.update(seq.block_table[seq.num_cached_blocks :])
    yield part


RUNNERS = {"one": RepairedRunner, "tp": RepairedRunner, "cp": ContextParallelRunner}


@contextmanager
def running(kind: str, ranks: int, folder: Path, **options: Any) -> Iterator[Any]:
    """One of nano-vllm's engines: ``"one"`` device, ``"tp"`` or ``"cp"``."""
    choose_port()
    tokenizer = SimpleNamespace(eos_token_id=-1)
    with patch.object(llm_engine, "ModelRunner", RUNNERS[kind]):
        engine = LLM(
            str(folder),
            tensor_parallel_size=1 if kind == "one" else ranks,
            tokenizer=tokenizer,
            enforce_eager=stand_ins.ON_CPU,
            **options,
        )
    atexit.unregister(engine.exit)
    try:
        yield engine
    except BaseException:
        # To exit, ranks wait for each other.
        for process in engine.ps:
            process.terminate()
        raise
    else:
        engine.exit()
    finally:
        # The next one begins with the whole memory.
        gc.collect()
        torch.cuda.empty_cache()


def check(ranks: int, shape: Shape) -> bool:
    """Whether the tokens of ``"cp"`` are those of ``"one"``, where all prefills are split, and where only long ones are."""
    longest = 1031 if stand_ins.ON_CPU else 16411
    requests = requests_to_check(shape.vocab, longest)
    options = {"max_model_len": longest + 256, "max_num_batched_tokens": 2 * longest, "max_num_seqs": 16, "gpu_memory_utilization": 0.4}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), shape, max_length=longest + 256)
        with running("one", 1, Path(folder), **options) as engine:
            engine.model_runner.record = True
            own = serve(engine, requests, Steps())
        good = True
        with running("cp", ranks, Path(folder), **options) as engine:
            engine.model_runner.record = True
            for split_from in (1, 700):
                engine.model_runner.call("set_split_from", split_from)
                print(f"over {ranks} ranks, prefills of {split_from} tokens and more split:")
                good &= compare(requests, own, serve(engine, requests, Steps()), shape.dtype)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="processes, each with a GPU where there are some")
    arguments = parser.parse_args()
    return 0 if check(arguments.ranks, SMALL if stand_ins.ON_CPU else Shape()) else 1


if __name__ == "__main__":
    sys.exit(main())
