"""A small transformer of one's own on cpattn: prefill of three prompts, then a decode step, which checks itself.

torchrun --nproc-per-node 4 examples/custom_model.py
python examples/custom_model.py --compile

All that a model needs: shard the token ids, rotate by ``meta.position_ids``, call ``cp_attention`` where attention is, and
unshard what has to be whole. Everything else (norms, projections, the MLP) works on rows, and does not know of ranks.
It takes a GPU for each process where there are so many, else the CPU. With --compile the model is one graph, attention included,
which serves both steps.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import cpattn
from cpattn.testing import relative_rmse

VOCAB, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 3, 8, 2, 32
WIDTH = HEADS * HEAD_DIM

# From q [rows, HEADS, HEAD_DIM] and k, v [rows, KV_HEADS, HEAD_DIM] to [rows, HEADS, HEAD_DIM].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotate(x: Tensor, position_ids: Tensor) -> Tensor:
    """RoPE (Su et al., arXiv:2104.09864) for x ``[rows, heads, HEAD_DIM]`` at absolute positions ``[rows]``."""
    half = HEAD_DIM // 2
    angles = position_ids[:, None] * 1e4 ** (-torch.arange(half, dtype=x.dtype, device=x.device) / half)
    cos, sin = angles.cos()[:, None].to(x), angles.sin()[:, None].to(x)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Grouped-query attention with RoPE, around a function that attends."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), -1, HEAD_DIM).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        out: Tensor = self.out(attend(rotate(q, position_ids), rotate(k, position_ids), v).flatten(1))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, position_ids: Tensor, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), position_ids, attend)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor, attends: list[Attend]) -> Tensor:
        """Logits ``[rows, VOCAB]`` from token ids and absolute positions ``[rows]``; ``attends`` has a function a layer."""
        x = self.embedding(input_ids)
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, position_ids, attend)
        logits: Tensor = self.head(self.norm(x))
        return logits


def run(model: Any, prompts: list[Tensor], next_ids: Tensor, cp_size: int, cp_rank: int) -> tuple[Tensor, int]:
    """Prefills the prompts and decodes one token for each: the logits of all tokens, on every rank, and how many tokens were
    prefilled on this one."""
    names = range(len(prompts))
    # Each rank keeps the keys and values of its own tokens.
    device = next_ids.device
    pool = cpattn.KVPool(64, 16, LAYERS, KV_HEADS, HEAD_DIM, device=device, cp_size=cp_size, cp_rank=cp_rank, sharded=True)
    for name in names:
        pool.admit(name)

    def step(input_ids: Tensor, lengths: list[int]) -> tuple[Tensor, int]:
        # Once a step: the layout, this rank's view of it, and where its pages are.
        meta = pool.plan(list(zip(names, lengths, strict=True))).metadata(cp_rank, device)
        page_table = pool.page_table(names)
        attends = [partial(cpattn.cp_attention, meta=meta, kv_cache=pool.layer(layer, page_table)) for layer in range(LAYERS)]
        logits = model(cpattn.shard(input_ids, meta), meta.position_ids, attends)
        return cpattn.unshard(logits, meta), meta.num_tokens

    prefilled, tokens_here = step(torch.cat(prompts), [len(prompt) for prompt in prompts])
    decoded, _ = step(next_ids, [1] * len(prompts))
    return torch.cat([prefilled, decoded]), tokens_here


def run_plain(model: Model, prompts: list[Tensor], next_ids: Tensor) -> Tensor:
    """The same logits without cpattn: one sequence at a time, with torch's own attention."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)

    sequences = [torch.cat([prompt, next_id[None]]) for prompt, next_id in zip(prompts, next_ids, strict=True)]
    logits = [model(sequence, torch.arange(len(sequence), device=sequence.device), [attend] * LAYERS) for sequence in sequences]
    return torch.cat([x[:-1] for x in logits] + [x[-1:] for x in logits])


def main() -> int:
    if sys.argv[1:] not in ([], ["--compile"]):
        print("it takes --compile or nothing; start this with: torchrun --nproc-per-node 4 examples/custom_model.py", file=sys.stderr)
        return 1
    cp_rank, cp_size = 0, 1
    on_gpus = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if on_gpus else "gloo")
        cp_rank, cp_size = dist.get_rank(), dist.get_world_size()

    # Random weights and prompts; the seed makes them the same on every rank.
    torch.manual_seed(0)
    model = Model().to(device)
    prompts = [torch.randint(VOCAB, (length,)).to(device) for length in (90, 1, 37)]
    next_ids = torch.randint(VOCAB, (3,)).to(device)
    with torch.no_grad():
        # Sizes are unknown to the graph from the start, or it would be made anew for the second step.
        compiled = torch.compile(model, fullgraph=True, dynamic=True) if "--compile" in sys.argv else model
        logits, tokens_here = run(compiled, prompts, next_ids, cp_size, cp_rank)
        plain = run_plain(model, prompts, next_ids)
        truth = run_plain(model.double(), prompts, next_ids)

    error, plain_error = relative_rmse(logits, truth), relative_rmse(plain, truth)
    print(
        f"rank {cp_rank} of {cp_size} on {device}: {tokens_here} of {sum(map(len, prompts))} prompt tokens here, relative RMSE of "
        f"the logits {error:.1e} against float64 (the plain model's: {plain_error:.1e})"
    )
    if dist.is_initialized():
        dist.destroy_process_group()
    # Sums in another order round differently, to an error of the same size.
    return int(error > 2 * plain_error)


if __name__ == "__main__":
    sys.exit(main())
