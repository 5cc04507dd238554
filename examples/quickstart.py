"""The smallest distributed use of cpattn, which checks itself.

torchrun --nproc-per-node 4 examples/quickstart.py

It takes a GPU for each process where there are so many, over NCCL; else the CPU, over gloo.
"""

import os
import sys

import torch
import torch.distributed as dist

import cpattn
from cpattn.testing import oracle_attention, relative_rmse

if not dist.is_torchelastic_launched():
    sys.exit("start this with: torchrun --nproc-per-node 4 examples/quickstart.py")
on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
if on_gpus:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpus else "gloo")
rank, cp_size = dist.get_rank(), dist.get_world_size()

# Three requests: a prompt, a follow-up over 512 cached tokens, and a decode step over 300.
batch = [(0, 700), (512, 130), (300, 1)]
meta = cpattn.build_metadata(batch, cp_size, rank, device, partition="auto")

# Random tensors stand in for a model's projections; the seed makes them the same on every rank.
torch.manual_seed(0)
sizes = {"q": (831, 8, 64), "k": (831, 2, 64), "v": (831, 2, 64), "cached k": (812, 2, 64), "cached v": (812, 2, 64)}
q, k, v, *cached = (torch.randn(size).to(device) for size in sizes.values())
cache = cpattn.PackedKV(*cached)

q_local, k_local, v_local = (cpattn.shard(x, meta) for x in (q, k, v))
out_local = cpattn.cp_attention(q_local, k_local, v_local, meta, kv_cache=cache)
out = cpattn.unshard(out_local, meta)

expected, _ = oracle_attention(q, k, v, batch, prefix_k=cache.k, prefix_v=cache.v)
error = relative_rmse(out, expected)
print(
    f"rank {rank} of {cp_size} on {device}: {meta.num_tokens} of {meta.plan.num_tokens} tokens, relative RMSE {error:.1e} against float64"
)
dist.destroy_process_group()
sys.exit(error > 1e-6)
