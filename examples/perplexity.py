"""The perplexity of a long text, of which each rank has its part. Logits exist for a few rows at a time.

torchrun --nproc-per-node 4 examples/perplexity.py [--tokens 100000]
torchrun --nproc-per-node 4 examples/perplexity.py --model Qwen/Qwen3-0.6B --text README.md

The first takes a tiny model and this project's pages, and checks itself. The second takes a model and a text of yours. Ranks take
a GPU each where there are so many, else the CPU. Started by itself it is one rank.
"""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

try:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
except ModuleNotFoundError:
    sys.exit("this needs transformers: pip install 'cpattn[transformers]'")

import cpattn
from cpattn.integrations import transformers as cpattn_hf

# Rows whose logits exist at a time: of a vocabulary of 128k, 0.5 GB in float32.
ROWS_AT_A_TIME = 1024


def make_model(device: torch.device, length: int) -> Any:
    """Random weights, so that nothing is downloaded; the seed makes them the same on every rank."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max(length, 2),
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="cpattn").eval().to(device)


def read_text(length: int, device: torch.device) -> torch.Tensor:
    """The bytes of this project's pages, as token ids; over and over where they are too few."""
    pages = b"".join(page.read_bytes() for page in sorted((Path(__file__).parents[1] / "docs").glob("*.md")))
    text = torch.frombuffer(bytearray(pages), dtype=torch.uint8).long()
    return text.repeat(-(-length // len(text)))[:length].to(device)


def load(name: str, text: Path, length: int | None, device: torch.device) -> tuple[Any, torch.Tensor]:
    """A model of the Hub or of a folder, and the token ids of a text, or the first of them."""
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="cpattn").eval().to(device)
    return model, AutoTokenizer.from_pretrained(name)(text.read_text(), return_tensors="pt").input_ids[0, :length].to(device)


@torch.no_grad()
def check_head(model: Any, input_ids: torch.Tensor, group: Any, rank: int, cp_size: int) -> None:
    """Some models cap or scale what their head gives (Gemma 2, Cohere): their loss would be another one than here."""
    meta = cpattn.build_metadata([(0, len(input_ids))], cp_size, rank, input_ids.device)
    with cpattn_hf.context_parallel(model, meta, group=group) as cp:
        logits = cp.gather(model(**cp.inputs(input_ids)).logits)
        hidden = cp.gather(model.get_decoder()(**cp.inputs(input_ids)).last_hidden_state)
    # Within a few roundings to half precision. What changes logits by less than that changes the loss as little.
    if not torch.allclose(model.get_output_embeddings()(hidden), logits, rtol=0.02, atol=0.02):
        sys.exit(f"{type(model).__name__} does more to its logits than its head: do the same in mean_loss")


@torch.no_grad()
def mean_loss(model: Any, input_ids: torch.Tensor, group: Any, rank: int, cp_size: int) -> float:
    """Over all tokens but the first, in nats; the same on every rank."""
    meta = cpattn.build_metadata([(0, len(input_ids))], cp_size, rank, input_ids.device)
    with cpattn_hf.context_parallel(model, meta, group=group) as cp:
        hidden = model.get_decoder()(**cp.inputs(input_ids)).last_hidden_state[0]  # [meta.rows, hidden_size]
        labels, head = cp.labels(input_ids)[0], model.get_output_embeddings()
        total = hidden.new_zeros((), dtype=torch.float64)
        for rows, of_rows in zip(torch.split(hidden, ROWS_AT_A_TIME), torch.split(labels, ROWS_AT_A_TIME), strict=True):
            total += F.cross_entropy(head(rows).float(), of_rows, reduction="sum", ignore_index=-100)
        return float(cp.loss(total / (len(input_ids) - 1)))


@torch.no_grad()
def own_loss(model: Any, input_ids: torch.Tensor) -> float:
    """That of the same weights without cpattn, at once."""
    plain = type(model)(model.config).eval().to(model.device)
    plain.load_state_dict(model.state_dict())
    plain.set_attn_implementation("sdpa")
    return float(plain(input_ids[None], labels=input_ids[None], use_cache=False).loss)


def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="of the text (default: 4001, or all of a text of yours)")
    parser.add_argument("--model", metavar="NAME", help="of the Hub, or a folder")
    parser.add_argument("--text", type=Path, metavar="FILE", help="for it to read")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.text is None):
        parser.error("--model and --text go together")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    on_gpus = torch.cuda.device_count() >= processes
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    if dist.is_torchelastic_launched():
        dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, cp_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cpattn_hf.register()
    if arguments.model is None:
        length = arguments.tokens or 4001
        model, input_ids = make_model(device, length), read_text(length, device)
    else:
        model, input_ids = load(arguments.model, arguments.text, arguments.tokens, device)
        check_head(model, input_ids[:64], None, rank, cp_size)
    loss = mean_loss(model, input_ids, None, rank, cp_size)
    # Sums in another order round differently: a mean of numbers of a few units, in float32.
    good = arguments.model is not None or rank > 0 or abs(loss - own_loss(model, input_ids)) < 1e-4
    verdict = "" if arguments.model is not None else ", as the model itself" if good else ", ANOTHER LOSS than the model itself"
    tokens = f"{len(input_ids):,} tokens"
    print(f"rank {rank} of {cp_size} on {device}: a loss of {loss:.4f}, a perplexity of {math.exp(loss):.1f} over {tokens}{verdict}")
    if dist.is_initialized():
        dist.destroy_process_group()
    return good


if __name__ == "__main__":
    sys.exit(not main())
