"""A Hugging Face model with its sequence sharded over the ranks, which checks itself.

torchrun --nproc-per-node 4 examples/hugging_face.py

It takes a GPU for each process where there are so many, else the CPU.
"""

import os
import sys

import torch
import torch.distributed as dist

try:
    from transformers import AutoModelForCausalLM, LlamaConfig
except ModuleNotFoundError:
    sys.exit("this needs transformers: pip install 'cpattn[transformers]'")

import cpattn
from cpattn.integrations import transformers as cpattn_hf
from cpattn.testing import relative_rmse

if not dist.is_torchelastic_launched():
    sys.exit("start this with: torchrun --nproc-per-node 4 examples/hugging_face.py")
on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
if on_gpus:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpus else "gloo")
rank, cp_size = dist.get_rank(), dist.get_world_size()

# Random weights, so that nothing is downloaded; the seed makes them, and the prompts, the same on every rank.
# A real model is loaded by AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpattn").
cpattn_hf.register()
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    initializer_range=0.2,
)
model = AutoModelForCausalLM.from_config(config, attn_implementation="cpattn").eval().to(device)
prompts = [torch.randint(512, (length,)).to(device) for length in (301, 1, 97)]
input_ids = torch.cat(prompts)

batch = [(0, len(prompt)) for prompt in prompts]  # (prefix_len, extend_len) of each prompt
meta = cpattn.build_metadata(batch, cp_size, rank, device, partition="auto")

with torch.no_grad(), cpattn_hf.context_parallel(model, meta) as cp:
    logits_local = model(**cp.inputs(input_ids)).logits  # [1, meta.rows, vocab]
    logits = cp.gather(logits_local)  # [399, vocab], on every rank
    # After a prefill only the last token of each prompt matters; the others' logits are not even computed.
    next_tokens = cp.gather_last(model(**cp.inputs(input_ids, last_only=True)).logits).argmax(-1)  # [3]

# The same model as it is without cpattn, one prompt at a time: in float32, and in float64 to tell what rounding does to it.
model.set_attn_implementation("sdpa")
with torch.no_grad():
    plain = torch.cat([model(prompt[None], use_cache=False).logits[0] for prompt in prompts])
    model.double()
    truth = torch.cat([model(prompt[None], use_cache=False).logits[0] for prompt in prompts])
error, plain_error = relative_rmse(logits, truth), relative_rmse(plain, truth)
last = torch.tensor([len(prompt) for prompt in prompts], device=device).cumsum(0) - 1
same = torch.equal(next_tokens, plain[last].argmax(-1))
print(
    f"rank {rank} of {cp_size} on {device}: {meta.num_tokens} of {len(input_ids)} tokens here, relative RMSE of the logits {error:.1e} "
    f"(the plain model's: {plain_error:.1e}), next tokens {next_tokens.tolist()}"
)
dist.destroy_process_group()
# Sums in another order round differently, to an error of the same size.
sys.exit(error > 2 * plain_error or not same)
