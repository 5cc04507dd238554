"""Greedy and sampled answers of a Hugging Face model over several ranks, which checks itself.

torchrun --nproc-per-node 4 examples/hf_generate.py

It takes a GPU for each process where there are so many, else the CPU. Started by itself it is one rank.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Qwen3Config

from cpattn.integrations import transformers as cpattn_hf

NEW_TOKENS = 12


def make_model(device: torch.device) -> Any:
    """Random weights, so that nothing is downloaded; the seed makes them the same on every rank. A real model is loaded by
    AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpattn")."""
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="cpattn").eval().to(device)


def run(model: Any, group: Any, rank: int) -> bool:
    """What each rank does; whether the greedy answers are the model's own."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(512, (length,), generator=generator).to(model.device) for length in (301, 1, 97)]
    greedy = cpattn_hf.generate(model, prompts, group=group, max_new_tokens=NEW_TOKENS)
    drawn = cpattn_hf.generate(
        model, prompts, group=group, max_new_tokens=NEW_TOKENS, do_sample=True, temperature=0.8, top_p=0.95, seed=7, cache="replicated"
    )
    if rank == 0:
        for prompt, best, other in zip(prompts, greedy, drawn, strict=True):
            print(f"{len(prompt):4} tokens, greedy {best[len(prompt) :].tolist()}, sampled {other[len(prompt) :].tolist()}")
    return rank > 0 or all(torch.equal(mine, own) for mine, own in zip(greedy, own_answers(model, prompts), strict=True))


def own_answers(model: Any, prompts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of the same weights without cpattn, one prompt at a time."""
    plain = type(model)(model.config).eval().to(model.device)
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("sdpa")
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    return [plain.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)[0] for prompt in prompts]


def main() -> bool:
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_gpus = torch.cuda.device_count() >= processes
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, cp_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cpattn_hf.register()
    good = run(make_model(device), None, rank)
    print(f"rank {rank} of {cp_size} on {device}: {'as the model itself' if good else 'OTHER TOKENS than the model itself'}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return good


if __name__ == "__main__":
    sys.exit(not main())
