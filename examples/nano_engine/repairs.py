"""nano-vllm-fork 20260210, so that it runs on more than one rank at all, and is seen to be the one that is known.

Nothing of this is for cpattn: its own tensor parallelism needs it, too.
"""

from __future__ import annotations

import inspect
import os
import socket
from collections import defaultdict
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import torch
import torch.distributed as dist
from nanovllm.engine import llm_engine, model_runner
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.attention import Attention
from nanovllm.layers.embed_head import ParallelLMHead
from nanovllm.models import qwen3
from nanovllm.utils.context import Context

from nano_engine import stand_ins

_PORT = "NANO_VLLM_PORT"
_PARAMETERS = {
    llm_engine.ModelRunner: "config rank event",
    llm_engine.ModelRunner.prepare_prefill: "self seqs",
    llm_engine.ModelRunner.prepare_block_tables: "self seqs",
    llm_engine.ModelRunner.allocate_kv_cache: "self",
    llm_engine.ModelRunner.run: "self seqs is_prefill",
    llm_engine.ModelRunner.run_model: "self input_ids positions is_prefill",
    llm_engine.ModelRunner.write_shm: "self method_name args",
    Attention: "num_heads head_dim scale num_kv_heads",
    Attention.forward: "self q k v",
    ParallelLMHead.forward: "self x",
    qwen3.get_rope: "head_size rotary_dim max_position base rope_scaling",
    Context: "is_prefill cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k slot_mapping context_lens block_tables",
}


def check_interface() -> None:
    """Raises:
    RuntimeError: what is replaced is not as in the release that this example knows.
    """
    for thing, known in _PARAMETERS.items():
        found = " ".join(inspect.signature(thing).parameters)
        if found != known:
            raise RuntimeError(
                f"this example knows nano-vllm-fork 20260210, where {thing.__qualname__} takes ({known}); here it takes ({found}): "
                "pip install --no-deps nano-vllm-fork==20260210"
            )


def choose_port() -> None:
    """Before an engine is made: the port of its process group, for all of its processes."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        os.environ[_PORT] = str(chosen.getsockname()[1])


def repair() -> None:
    """Of this process; each rank's does it when it imports the example."""
    module: Any = model_runner
    # Each rank looks for a free port by itself, and so finds another one than the rank that listens.
    module.find_available_port = lambda: int(os.environ[_PORT])
    # One name for all engines of a machine.
    module.SharedMemory = lambda name, **options: SharedMemory(f"{name}_{os.environ[_PORT]}", **options)
    module.print = lambda *_: None
    # What other ranks get of a request lacks this, and they ask for it.
    Sequence.cfg_scale = 1.0
    # Its norms compile anew for each shape of their input; after eight of them torch would give up, and run them as they are.
    torch._dynamo.config.recompile_limit = 64
    # Some releases of transformers 5 give a dict for plain RoPE as well, which it refuses.
    get_rope = qwen3.get_rope
    qwen3.get_rope = lambda *args, rope_scaling=None, **options: get_rope(*args, **options)
    if stand_ins.ON_CPU:
        stand_ins.run_on_cpu()


class RepairedRunner(model_runner.ModelRunner):  # type: ignore[misc]
    """nano-vllm's own, which keeps the two largest logits of each token where ``record`` is true."""

    def __init__(self, config: Any, rank: int, event: Any) -> None:
        self.record = False
        self.tops: dict[int, list[list[float]]] = defaultdict(list)  # of each request, by its seq_id
        self._last_tops: list[list[float]] = []
        super().__init__(config, rank, event)

    def allocate_kv_cache(self) -> None:
        super().allocate_kv_cache()
        # Rank 0 gives out pages, of which another rank may have fewer.
        blocks = torch.tensor(self.config.num_kvcache_blocks)
        dist.all_reduce(blocks, dist.ReduceOp.MIN)
        self.config.num_kvcache_blocks = int(blocks)
        # Attention kernels read whole tiles: what no token has written must be finite.
        self.kv_cache.zero_()

    def run_model(self, *args: Any) -> Any:
        logits = super().run_model(*args)
        if self.record:
            self._last_tops = logits.float().topk(2).values.tolist()
        return logits

    def run(self, seqs: list[Any], is_prefill: bool) -> list[int] | None:
        tokens: list[int] | None = super().run(seqs, is_prefill)
        if self.record:
            for seq, top in zip(seqs, self._last_tops, strict=True):
                self.tops[seq.seq_id].append(top)
        return tokens
