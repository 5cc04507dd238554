"""What generation goes by: a GenerationConfig of transformers, read as its own ``generate`` reads it, and what of it is honoured."""

from __future__ import annotations

import inspect
import numbers
from difflib import get_close_matches
from typing import Any, NamedTuple

from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cpattn.errors import CPError, OptionError, UnsupportedError

HONOURED = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "eos_token_id", "pad_token_id")
# What generate of transformers takes for what nobody has set.
_DEFAULTS = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0}
# Options that are off at these values; all others are at None, False and 0.
_OFF: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "use_cache": True,
    # Models come with it for the sake of their sliding windows, and transformers itself passes it over.
    "cache_implementation": "hybrid",
}
# These say how something is done that is refused by another name, or that does not change tokens.
_MEANINGLESS = frozenset(
    {
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "bos_token_id",
        "decoder_start_token_id",
        "disable_compile",
        "early_stopping",
        "length_penalty",
        "max_length",  # counted with padding, and less than max_new_tokens, which is asked for.
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "target_lookbehind",
        "transformers_version",
    }
)
# Of model.generate. They are taken where they say nothing: processors, streamers, assistants and the like.
_ARGUMENTS = frozenset(inspect.signature(GenerationMixin.generate).parameters)
_OWN_ARGUMENTS = "input_ids, attention_mask, group, cache, strategy, backend, check and seed"


class GenerationOptions(NamedTuple):
    """Attributes:
    max_new_tokens: of each answer, at least 1.
    do_sample: whether tokens are drawn, else each is the likeliest.
    warpers: what is done to logits before a token is drawn: transformers' own.
    eos: the tokens that end an answer.
    pad_token_id: what stands behind an answer that ended before others; None where none can.
    padding: the token that is padding in prompts without a mask: the pad_token_id that was given or configured, unless it ends answers.
    """

    max_new_tokens: int
    do_sample: bool
    warpers: LogitsProcessorList
    eos: frozenset[int]
    pad_token_id: int | None
    padding: int | None


def parse_options(model: PreTrainedModel, config: Any, given: dict[str, Any]) -> GenerationOptions:
    """The options of a call: what is given, else those of the config, else the model's own, else transformers' defaults.

    Raises:
        OptionError: a name that nobody knows, a value that makes no sense, or max_new_tokens that nobody says.
        UnsupportedError: an option that is not honoured.
    """
    if config is not None and not isinstance(config, GenerationConfig):
        raise OptionError(f"generation_config is a {type(config).__name__}; pass a transformers.GenerationConfig, or its fields by name")
    # Those of a config may be a model's own, and do no harm where they are off.
    unknown = given.keys() - vars(GenerationConfig()).keys() - _OFF.keys() - _MEANINGLESS - _ARGUMENTS
    if unknown:
        raise _unknown(min(unknown))
    asked: dict[str, Any] = dict(_DEFAULTS)
    for source in (getattr(model, "generation_config", None), config):
        asked |= {} if source is None else {name: value for name, value in vars(source).items() if value is not None and name[0] != "_"}
    asked |= given
    for name, value in asked.items():
        if name not in HONOURED and name not in _MEANINGLESS and not _is_off(name, value):
            raise _refusal(name, value)
    do_sample = asked["do_sample"]
    if not isinstance(do_sample, bool):
        raise OptionError(f"do_sample={do_sample!r}; pass True or False")
    eos = _token_ids("eos_token_id", asked.get("eos_token_id"))
    pad = _token_ids("pad_token_id", asked.get("pad_token_id"))
    if len(pad) > 1:
        raise OptionError(f"pad_token_id={pad}; pass one token id")
    return GenerationOptions(
        _max_new_tokens(asked.get("max_new_tokens"), given.get("max_length")),
        do_sample,
        _warpers(asked),
        frozenset(eos),
        pad_token_id=pad[0] if pad else eos[0] if eos else None,
        padding=pad[0] if pad and pad[0] not in eos else None,
    )


def _unknown(name: str) -> CPError:
    near = get_close_matches(name, HONOURED, n=1, cutoff=0.75)
    instead = f"did you mean {near[0]}?" if near else f"leave {name} out."
    return OptionError(f"generate has no option {name}; {instead} Beside {_OWN_ARGUMENTS} it takes {', '.join(HONOURED)}")


def _is_off(name: str, value: Any) -> bool:
    if value is None or (name in _OFF and value == _OFF[name]):
        return True
    return name not in _OFF and (value is False or (isinstance(value, (int, float)) and value == 0) or value in ([], {}, ()))


def _refusal(name: str, value: Any) -> CPError:
    if name not in vars(GenerationConfig()) and not isinstance(value, (bool, numbers.Number)):
        value = f"a {type(value).__name__}"
    return UnsupportedError(
        f"generate got {name}={value}, which it does not know how to honour: each prompt gets one answer, greedy or sampled, a token at a "
        f"time. Beside {_OWN_ARGUMENTS} it takes {', '.join(HONOURED)}. Leave {name} out; where the model's generation_config has it, "
        f"pass {name}={_OFF.get(name)}"
    )


def _max_new_tokens(value: Any, max_length: Any) -> int:
    if value is None:
        instead = "" if max_length is None else f" (max_length={max_length} counts the prompt as well, and with its padding)"
        raise OptionError(
            f"max_new_tokens is not given, nor does the generation_config have it; pass how long an answer may be, in tokens{instead}"
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise OptionError(f"max_new_tokens={value!r}; pass a positive integer")
    return int(value)


def _token_ids(name: str, value: Any) -> list[int]:
    """A token id or a list of them, as configurations have either."""
    values = [] if value is None else value.tolist() if hasattr(value, "tolist") else value
    values = values if isinstance(values, (list, tuple)) else [values]
    if any(isinstance(each, bool) or not isinstance(each, numbers.Integral) or each < 0 for each in values):
        raise OptionError(f"{name}={value!r}; pass a token id, or a list of them")
    return [int(each) for each in values]


def _warpers(asked: dict[str, Any]) -> LogitsProcessorList:
    """In the order in which transformers applies them."""
    warpers = LogitsProcessorList()
    temperature, top_k, top_p, min_p = (asked.get(name) for name in ("temperature", "top_k", "top_p", "min_p"))
    if not asked["do_sample"]:
        return warpers
    try:
        if temperature is not None and temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(temperature))
        if top_k:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None and top_p != 1.0:
            warpers.append(TopPLogitsWarper(top_p))
        if min_p is not None:
            warpers.append(MinPLogitsWarper(min_p))
    except (TypeError, ValueError) as refusal:
        raise OptionError(f"temperature={temperature!r}, top_k={top_k!r}, top_p={top_p!r}, min_p={min_p!r}: {refusal}") from refusal
    return warpers
