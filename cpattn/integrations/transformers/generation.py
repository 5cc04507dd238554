"""Generation over the ranks of a group: a prefill, then a step for each token, over a cache that may be sharded."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GenerationConfig

from cpattn.call import forward_context
from cpattn.call.agreed import validated
from cpattn.call.arguments import BackendChoice, StrategyChoice
from cpattn.errors import OptionError, UnknownNameError
from cpattn.graphs import leaves_graph
from cpattn.integrations.transformers.active import entered
from cpattn.integrations.transformers.batch_context import BatchContext
from cpattn.integrations.transformers.choose_tokens import check_chosen, next_tokens
from cpattn.integrations.transformers.generation_options import GenerationOptions, parse_options
from cpattn.integrations.transformers.layer_pages import PAGE_SIZE, LayerPages, PagedForward
from cpattn.integrations.transformers.models import Decoder, check_model
from cpattn.integrations.transformers.prompts import Prompts, check_vocabulary, parse_prompts
from cpattn.metadata.plan import plan
from cpattn.metadata.striped import Striped
from cpattn.transports.gather import gather_whole
from cpattn.transports.groups import Group, as_transport
from cpattn.transports.in_flight import InFlight
from cpattn.transports.transport import Transport

CACHES = ("sharded", "replicated")


class Over(NamedTuple):
    """How a generation runs: the transport of its group, and the options of every layer's call."""

    transport: Transport
    strategy: StrategyChoice = "auto"
    backend: BackendChoice = "auto"
    check: bool = False
    within: BatchContext | None = None


class _Asked(NamedTuple):
    """What a call asks for, checked."""

    decoder: Decoder
    prompts: Prompts
    options: GenerationOptions
    rule: Striped | None
    seed: int | None

    def __str__(self) -> str:
        lengths = [len(ids) for ids in self.prompts.ids]
        warpers = [f"{type(each).__name__}{vars(each)}" for each in self.options.warpers]
        options = self.options._replace(warpers=None, eos=sorted(self.options.eos))  # type: ignore[arg-type]
        return f"generate, {lengths} tokens, {options}, {warpers}, owner={self.rule}, seed={self.seed}"


@leaves_graph
def generate(
    model: Any,
    input_ids: Any,
    *,
    attention_mask: Tensor | None = None,
    group: Group = None,
    cache: str = "sharded",
    strategy: StrategyChoice = "auto",
    backend: BackendChoice = "auto",
    check: bool = False,
    seed: int | None = None,
    generation_config: GenerationConfig | None = None,
    **options: Any,
) -> Tensor | list[Tensor]:
    """What ``model.generate`` returns, with the sequences of all prompts over the ranks of ``group``. A collective call.

    >>> import transformers
    >>> from cpattn.integrations import transformers as cpattn_hf
    >>> cpattn_hf.register()
    >>> config = transformers.LlamaConfig(
    ...     vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    ... )
    >>> model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="cpattn").eval()
    >>> answers = cpattn_hf.generate(model, [[5, 17, 3, 40, 8], [11]], max_new_tokens=4, eos_token_id=None)
    >>> [len(ids) for ids in answers]
    [9, 5]

    Keys and values stay in pages from step to step. Requests that have ended take no part in further steps; there is no padding.

    Args:
        model: a causal decoder model of transformers with ``attn_implementation="cpattn"``, in evaluation mode, the same on every
            rank.
        input_ids: the prompts, the same on every rank: a list of int64 or int32 tensors ``[length]``, or of lists of integers, each of its
            own length; or a tensor ``[batch, length]``.
        attention_mask: ``[batch, length]``, 0 on the padding of that tensor, which is on the left. Without it pad_token_id is padding
            wherever it stands, unless it is an eos token too, as ``model.generate`` has it.
        group, strategy, backend, check: as in :func:`cpattn.cp_attention`, of every layer of every step. With ``check`` the
            ranks compare what they were asked for first.
        cache: ``"sharded"``: each rank holds its part of every sequence, pages of 16 tokens in turn; or ``"replicated"``: all of them.
            Either has room for ``length + max_new_tokens - 1`` tokens of each prompt from the start.
        seed: of sampling. The same seed gives the same tokens, whatever the size of the group, but for what rounding changes. None: rank
            0 takes one from torch's own generator, as ``torch.manual_seed`` has set it.
        generation_config, options: as ``model.generate`` takes them, and by the same defaults: what is given by name, else what the
            config says, else the model's own. Honoured are max_new_tokens, do_sample, temperature, top_k, top_p, min_p, eos_token_id
            and pad_token_id. Beams, penalties, processors, assistants, streamers and the like are refused.

    Returns:
        Prompts and answers. For a list a list of int64 tensors ``[length + new]``, an answer ending with its eos token, if any; for
        a tensor ``[batch, length + longest]``, as ``model.generate`` returns it, with pad_token_id after answers that ended before others.

    Raises:
        OptionError: there is no such option or value, or nobody says max_new_tokens. UnsupportedError: an option or the model is not
            supported.
        CPError: a token id is not in the model's vocabulary, or tokens cannot be drawn, as logits are not finite.
            In its other subclasses: prompts or group do not fit, the model is within a :func:`context_parallel`
            (whose ``cp.generate`` is for that), or it does not attend through cpattn.
    """
    is_alone = group is None and not (dist.is_available() and dist.is_initialized())
    over = Over(as_transport(group, cp_size=int(is_alone)), strategy, backend, check)
    more = {"cache": cache, "seed": seed, "generation_config": generation_config, **options}
    return run(model, input_ids, attention_mask, over, more)


@leaves_graph
@torch.no_grad()
def run(model: Any, input_ids: Any, attention_mask: Any, over: Over, more: dict[str, Any]) -> Tensor | list[Tensor]:
    """What :func:`generate` returns.

    Args:
        more: cache, seed, generation_config and the options of generation, by name.
    """
    transport = over.transport
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    device = next((parameter.device for parameter in parameters), torch.device("cpu"))

    def validate() -> _Asked:
        asked = _asked(model, input_ids, attention_mask, **more)
        if over.within is not None:
            over.within.decoder.check_same(asked.decoder)
        return asked

    with InFlight(transport, device) as in_flight:
        asked = validated(validate, str, None, in_flight, over.check, None)
    answers = _answers(model, asked, over)
    return asked.prompts.with_answers(answers, asked.options.pad_token_id)


def _asked(
    model: Any, input_ids: Any, attention_mask: Any, cache: Any = "sharded", seed: Any = None, generation_config: Any = None, **given: Any
) -> _Asked:
    decoder = check_model(model)
    if not isinstance(cache, str) or cache not in CACHES:
        raise UnknownNameError(f"cache={cache!r}; choose one of {', '.join(map(repr, CACHES))}")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63):
        raise OptionError(f"seed={seed!r}; pass an integer from 0 to 2**63 - 1, the same on every rank, or None")
    options = parse_options(decoder.model, generation_config, given)
    prompts = parse_prompts(input_ids, attention_mask, options.padding, decoder.model.device)
    check_vocabulary(prompts.ids, decoder.vocab_size)
    # Before a step is made, not in the middle of an answer.
    decoder.check_lengths(max(map(len, prompts.ids)) + options.max_new_tokens - 1)
    return _Asked(decoder, prompts, options, Striped(PAGE_SIZE) if cache == "sharded" else None, seed)


def _answers(model: Any, asked: _Asked, over: Over) -> list[list[int]]:
    """The new tokens of each prompt, up to and with the one that ends it."""
    decoder, (prompts, _), options, rule, seed = asked
    transport, device = over.transport, prompts[0].device
    answers: list[list[int]] = [[] for _ in prompts]
    # The last token of an answer is not in the cache, as no one attends to it.
    longest = np.array([len(ids) for ids in prompts]) + options.max_new_tokens - 1
    pages = LayerPages(longest, rule, transport.size, device)
    draws = _generator(seed, transport, device) if options.do_sample else None
    live, cached, new = list(range(len(prompts))), [0] * len(prompts), torch.cat(prompts)
    lengths = [len(ids) for ids in prompts]
    while live:
        batch = [(cached[i], lengths[i]) for i in live]
        meta = plan(batch, transport.size, partition="auto", owner=rule).metadata(transport.rank, device)
        forward = PagedForward(meta, transport, over.strategy, over.backend, over.check, pages=pages)
        context = BatchContext(decoder, forward)
        with entered(context, over.within), forward_context.entered(forward):
            logits = model(**context.inputs(new, last_only=True)).logits
        # All prompts' numbers in every step: what one answer draws does not depend on which others have ended.
        drawn = None if draws is None else torch.rand(len(prompts), dtype=torch.float64, generator=draws)[live].to(device)
        tokens = next_tokens(context, transport, logits, options.warpers, drawn)
        goes_on, chosen = [], tokens.tolist()
        check_chosen(chosen, live)
        for place, (i, token) in enumerate(zip(live, chosen, strict=True)):
            cached[i], lengths[i] = cached[i] + lengths[i], 1
            answers[i].append(token)
            if token not in options.eos and len(answers[i]) < options.max_new_tokens:
                goes_on.append(place)
        if len(goes_on) < len(live):
            live, tokens = [live[place] for place in goes_on], tokens[goes_on]
            pages.select(live)
        new = tokens
    return answers


def _generator(seed: int | None, transport: Transport, device: torch.device) -> torch.Generator:
    """Numbers that all ranks draw alike: by the seed, or by one that rank 0 takes from torch's own generator."""
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
        if transport.size > 1:
            with InFlight(transport, device) as in_flight:
                seed = int(gather_whole(in_flight, "seed", torch.tensor([seed], device=device))[0])
    return torch.Generator().manual_seed(seed)
