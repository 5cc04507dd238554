"""The smallest distributed use of cpattn, which checks itself.

torchrun --nproc-per-node 4 examples/quickstart.py
"""

import sys

import torch
import torch.distributed as dist

import cpattn
from cpattn.testing import oracle_attention, relative_rmse

if not dist.is_torchelastic_launched():
    sys.exit("start this with: torchrun --nproc-per-node 4 examples/quickstart.py")
dist.init_process_group("gloo")
rank, cp_size = dist.get_rank(), dist.get_world_size()

# Three requests: a prompt, a follow-up over 512 cached tokens, and a decode step over 300.
batch = [(0, 700), (512, 130), (300, 1)]
meta = cpattn.build_metadata(batch, cp_size, rank)

# Random tensors stand in for a model's projections; the seed makes them the same on every rank.
torch.manual_seed(0)
q, k, v = torch.randn(831, 8, 64), torch.randn(831, 2, 64), torch.randn(831, 2, 64)
cache = cpattn.PackedKV(torch.randn(812, 2, 64), torch.randn(812, 2, 64))

q_local, k_local, v_local = (cpattn.shard(x, meta) for x in (q, k, v))
out_local = cpattn.cp_attention(q_local, k_local, v_local, meta, kv_cache=cache)
out = cpattn.unshard(out_local, meta)

expected, _ = oracle_attention(q, k, v, batch, prefix_k=cache.k, prefix_v=cache.v)
error = relative_rmse(out, expected)
print(f"rank {rank} of {cp_size}: {meta.num_tokens} of {meta.plan.num_tokens} tokens here, relative RMSE {error:.1e} against float64")
dist.destroy_process_group()
sys.exit(error > 1e-6)
