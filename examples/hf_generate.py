"""Answers of a Hugging Face model over several ranks: greedy and sampled ones of a tiny model, which it checks, or those of yours.

torchrun --nproc-per-node 4 examples/hf_generate.py
torchrun --nproc-per-node 4 examples/hf_generate.py --model Qwen/Qwen3-0.6B --prompt "The capital of France is"

It takes a GPU for each process where there are so many, else the CPU. Started by itself it is one rank.
"""

import argparse
import os
import sys
from typing import Any

import torch
import torch.distributed as dist

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config
except ModuleNotFoundError:
    sys.exit("this needs transformers: pip install 'cpattn[transformers]'")

from cpattn.integrations import transformers as cpattn_hf

NEW_TOKENS = 12


def make_model(device: torch.device) -> Any:
    """Random weights, so that nothing is downloaded; the seed makes them the same on every rank."""
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


def continue_texts(name: str, texts: list[str], new_tokens: int, group: Any, device: torch.device) -> list[str]:
    """Each text with the model's answer, by the model's own configuration of generation; the same on every rank."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpattn").eval().to(device)
    prompts = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]
    # A penalty of repetitions, which some configurations have, is refused: it would need all of an answer's tokens for each one.
    answers = cpattn_hf.generate(model, prompts, group=group, max_new_tokens=new_tokens, repetition_penalty=1.0)
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="NAME", help="of the Hub, or a folder")
    parser.add_argument("--prompt", metavar="TEXT", action="append", help="for it to go on with; may be given several times")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="of its answers, at most")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.prompt is None):
        parser.error("--model and --prompt go together")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_gpus = torch.cuda.device_count() >= processes
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, cp_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cpattn_hf.register()
    good = True
    if arguments.model is None:
        good = run(make_model(device), None, rank)
        print(f"rank {rank} of {cp_size} on {device}: {'as the model itself' if good else 'OTHER TOKENS than the model itself'}")
    else:
        texts = continue_texts(arguments.model, arguments.prompt, arguments.new_tokens, None, device)
        if rank == 0:
            print(*texts, sep="\n\n")
    if dist.is_initialized():
        dist.destroy_process_group()
    return good


if __name__ == "__main__":
    sys.exit(not main())
