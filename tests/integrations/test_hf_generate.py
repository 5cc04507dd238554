"""Answers over several ranks: greedy ones are the model's own tokens, sampled ones are the same on every rank."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from programs import hf_cases
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

import cpattn
from cpattn.integrations import transformers as cpattn_hf
from cpattn.integrations.transformers.choose_tokens import choose
from cpattn.integrations.transformers.layer_pages import PAGE_SIZE, LayerPages
from cpattn.metadata.striped import Striped
from cpattn.testing import run_loopback

EXAMPLES = Path(__file__).parents[2] / "examples"
# Prime lengths, of which one takes several pages on each of three ranks, and a single token.
LENGTHS = (113, 1, 5, 13)
NEW = 7


def prompts_of() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 128, (length,), generator=generator) for length in LENGTHS]


def own_answer(model: Any, prompt: Tensor, **options: Any) -> Tensor:
    """What the model's own generate returns for one prompt."""
    model.set_attn_implementation("eager")
    answer: Tensor = model.generate(prompt[None], attention_mask=torch.ones_like(prompt)[None], do_sample=False, **options)[0]
    model.set_attn_implementation("cpattn")
    return answer


@pytest.fixture
def model() -> Any:
    cpattn_hf.register()
    llama = hf_cases.new_model("llama")
    llama.set_attn_implementation("cpattn")
    return llama


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_oss"])
def test_greedy_tokens_are_the_models_own(family: str) -> None:
    cpattn_hf.register()
    # With tied embeddings a random Gemma repeats its last token, whatever it attends to.
    model, prompts = hf_cases.new_model(family, tie_word_embeddings=False), prompts_of()
    model.generation_config.pad_token_id = 0
    without_end = [own_answer(model, prompt, max_new_tokens=NEW, eos_token_id=None) for prompt in prompts]
    # A token that ends one answer in the middle, where others go on.
    eos = next(
        token
        for token in sorted(set(torch.cat([answer[-NEW:] for answer in without_end]).tolist()))
        if 1 < min(lengths := [[*answer[-NEW:].tolist(), token].index(token) + 1 for answer in without_end]) < max(lengths)
    )
    expected = [own_answer(model, prompt, max_new_tokens=NEW, eos_token_id=eos) for prompt in prompts]
    assert len({len(answer) - length for answer, length in zip(expected, LENGTHS, strict=True)}) > 1
    for cp_size, cache in ((1, "sharded"), (2, "replicated"), (3, "sharded")):

        def answers(group: Any, cache: str = cache) -> Any:
            return cpattn_hf.generate(model, prompts, group=group, cache=cache, max_new_tokens=NEW, eos_token_id=[eos, 10**6])

        for given in run_loopback(answers, cp_size):
            assert all(torch.equal(mine, own) for mine, own in zip(given, expected, strict=True)), (cp_size, cache)


def test_padded_prompts_come_back_as_generate_returns_them(model: Any) -> None:
    prompts = [prompt[:9] for prompt in prompts_of()]
    width = max(map(len, prompts))
    padded = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    first = own_answer(model, prompts[0], max_new_tokens=2)[-1].item()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = first, 0
    model.set_attn_implementation("sdpa")
    expected = model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False)
    model.set_attn_implementation("cpattn")
    given: Any = run_loopback(lambda group: cpattn_hf.generate(model, padded, attention_mask=mask, group=group, max_new_tokens=5), 2)
    assert (expected[0, width:] == 0).any()
    assert all(torch.equal(each, expected) for each in given)


@pytest.mark.parametrize("eos", [None, 99, 0])
def test_padding_without_a_mask_is_what_generate_takes_for_it(model: Any, eos: int | None) -> None:
    """pad_token_id where it stands, but not where it ends answers."""
    padded = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 0, 11, 12]])
    model.generation_config.pad_token_id = 0
    model.set_attn_implementation("sdpa")
    expected, other = (
        model.generate(padded, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=eos) for mask in (None, padded != 0)
    )
    assert torch.equal(expected, other) == (eos != 0)
    model.set_attn_implementation("cpattn")
    given: Any = cpattn_hf.generate(model, padded, max_new_tokens=5, eos_token_id=eos)
    assert torch.equal(given, expected)


def test_generating_within_a_context(model: Any) -> None:
    prompts = prompts_of()
    expected = [own_answer(model, prompt, max_new_tokens=3) for prompt in prompts]
    meta, ids = cpattn.build_metadata([(0, length) for length in LENGTHS], 1, 0), torch.cat(prompts)
    with torch.no_grad(), cpattn_hf.context_parallel(model, meta) as cp:
        before = cp.gather(model(**cp.inputs(ids)).logits)
        answers = cp.generate(model, ids[None], max_new_tokens=3)
        assert all(torch.equal(mine, own) for mine, own in zip(answers, expected, strict=True))
        assert torch.equal(cp.gather(model(**cp.inputs(ids)).logits), before)
        with pytest.raises(cpattn_hf.ContextError, match="leave the first"):
            cpattn_hf.generate(model, prompts, max_new_tokens=3)
        with pytest.raises(cpattn.RowCountError, match="the batch has 132 new tokens"):
            cp.generate(model, ids[:-1], max_new_tokens=3)
        with pytest.raises(cpattn.OptionError, match=r"got attention_mask, strategy; its prompts are those of the context.*Leave att"):
            cp.generate(model, ids, max_new_tokens=3, strategy="ring", attention_mask=torch.ones(1, len(ids)))
        other = hf_cases.new_model("llama")
        with pytest.raises(cpattn_hf.ContextError, match="got another LlamaForCausalLM than the LlamaForCausalLM that"):
            cp.generate(other, ids, max_new_tokens=3)


# Sampling.


def test_sampled_tokens_are_the_same_on_every_rank_and_in_every_group(model: Any) -> None:
    def sampled(cp_size: int, seed: int | None) -> list[Tensor]:
        def answers(group: Any) -> Any:
            if seed is None and group.rank == 0:
                torch.manual_seed(11)
            return cpattn_hf.generate(model, prompts_of(), group=group, max_new_tokens=4, do_sample=True, temperature=1.5, seed=seed)

        first, *others = run_loopback(answers, cp_size)
        assert all(torch.equal(mine, its) for other in others for mine, its in zip(first, other, strict=True))
        tokens: list[Tensor] = first
        return tokens

    one, three, other_seed = sampled(1, 5), sampled(3, 5), sampled(1, 6)
    assert torch.equal(torch.cat(one), torch.cat(three))
    assert not torch.equal(torch.cat(one), torch.cat(other_seed))
    assert torch.equal(torch.cat(sampled(1, None)), torch.cat(sampled(1, None)))
    sampled(2, None)


def test_tokens_are_drawn_by_their_probabilities() -> None:
    """Of numbers that lie evenly each token gets as many as its probability says, to within one."""
    logits, count = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 2, 1000
    warpers = transformers.LogitsProcessorList(
        [transformers.TemperatureLogitsWarper(0.7), transformers.TopKLogitsWarper(9), transformers.TopPLogitsWarper(0.9)]
    )
    expected = warpers(torch.zeros(1, 1, dtype=torch.int64), logits.clone()).softmax(-1)[0] * count
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    counts = choose(logits.expand(count, -1), warpers, draws).bincount(minlength=40)
    assert ((counts - expected).abs() <= 1).all()
    assert counts[expected == 0].sum() == 0
    assert 3 < (counts > 0).sum() < 10
    # The smallest number and the largest do not reach tokens that were taken away.
    edges = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert (expected[choose(logits.expand(2, -1), warpers, edges)] > 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_without_finite_logits_all_ranks_say_that_nothing_can_be_drawn(model: Any, value: float) -> None:
    """Also those that did not compute them."""
    torch.nn.init.constant_(model.lm_head.weight, value)

    def refused(group: Any) -> str:
        with pytest.raises(cpattn.CPError, match=r"the logits of prompt 0 are not finite .*no token can be drawn. Look for what"):
            cpattn_hf.generate(model, [[5, 3]], group=group, max_new_tokens=2, do_sample=True, seed=1)
        return "refused"

    assert run_loopback(refused, 2) == ["refused"] * 2


def test_only_a_row_that_is_not_finite_has_no_token() -> None:
    logits = torch.tensor([[0.0, torch.nan], [0.0, -torch.inf], [-torch.inf, -torch.inf], [torch.inf, 0.0]])
    draws = torch.full((4,), 0.5, dtype=torch.float64)
    assert choose(logits, transformers.LogitsProcessorList(), draws).tolist() == [-1, 0, -1, -1]


# What a cache holds.


def test_a_sharded_cache_is_a_part_of_a_replicated_one() -> None:
    lengths, k = np.array([4 * PAGE_SIZE * 10, 1, PAGE_SIZE + 1]), torch.randn(3, 2, 8)
    sizes = []
    for rule in (None, Striped(PAGE_SIZE)):
        pages = LayerPages(lengths, rule, 4, torch.device("cpu"))
        first = pages.of(0, k, k[..., :4])
        assert pages.of(0, k, k) is first
        table = first.page_table
        pages.select([0, 2])
        second = pages.of(0, k, k)
        assert second.k_pages is first.k_pages
        assert torch.equal(second.page_table, table[[0, 2]])
        assert pages.nbytes == pages.num_pages * PAGE_SIZE * 2 * (8 + 4) * 4
        sizes.append(pages.num_pages)
    assert sizes == [40 + 1 + 2, 10 + 1 + 1]


# What is refused.


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"num_beams": 4}, cpattn.UnsupportedError, r"generate got num_beams=4.*one answer.*Leave num_beams out.*pass num_beams=1"),
        ({"assistant_model": torch.nn.Identity()}, cpattn.UnsupportedError, "generate got assistant_model=a Identity"),
        ({"repetition_penalty": 1.1}, cpattn.UnsupportedError, "repetition_penalty=1.1.*pass repetition_penalty=1.0"),
        ({"max_tokens": 3}, cpattn.OptionError, r"has no option max_tokens; did you mean max_new_tokens\? .* it takes max_new_tokens"),
        ({"typo": 0}, cpattn.OptionError, "generate has no option typo; leave typo out. Beside input_ids"),
        ({"max_new_tokens": None}, cpattn.OptionError, "max_new_tokens is not given"),
        ({"max_new_tokens": None, "max_length": 9}, cpattn.OptionError, r"in tokens \(max_length=9 counts the prompt as well"),
        ({"max_new_tokens": 0}, cpattn.OptionError, "max_new_tokens=0; pass a positive integer"),
        ({"do_sample": "yes"}, cpattn.OptionError, "do_sample='yes'; pass True or False"),
        ({"do_sample": True, "temperature": -1.0}, cpattn.OptionError, r"temperature=-1.0.*strictly positive"),
        ({"eos_token_id": "</s>"}, cpattn.OptionError, "eos_token_id='</s>'; pass a token id"),
        ({"pad_token_id": [1, 2]}, cpattn.OptionError, r"pad_token_id=\[1, 2\]; pass one token id"),
        ({"cache": "paged"}, cpattn.UnknownNameError, "cache='paged'; choose one of 'sharded', 'replicated'"),
        ({"seed": -1}, cpattn.OptionError, "seed=-1; pass an integer"),
        ({"generation_config": {}}, cpattn.OptionError, "generation_config is a dict"),
        ({"generation_config": transformers.GenerationConfig(penalty_alpha=0.6)}, cpattn.UnsupportedError, "penalty_alpha=0.6"),
        ({"attention_mask": torch.ones(1, 2)}, cpattn.CPError, "attention_mask with a list of prompts"),
        ({"input_ids": []}, cpattn.CPError, "no prompt"),
        ({"input_ids": [[3], []]}, cpattn.CPError, "prompt 1 has no token"),
        ({"input_ids": [[3], torch.ones(2, 2, dtype=torch.int64)]}, cpattn.RowCountError, r"prompt 1 has shape \(2, 2\)"),
        ({"input_ids": [["a"]]}, cpattn.TensorMismatchError, "prompt 0 is a list"),
        ({"input_ids": "text"}, cpattn.TensorMismatchError, "input_ids is a str"),
        (
            {"input_ids": {"input_ids": torch.ones(1, 3)}},
            cpattn.TensorMismatchError,
            r"input_ids is a dict; .* generate\(model, \*\*inputs",
        ),
        ({"input_ids": [[3], [5, 9, 128]]}, cpattn.CPError, "prompt 1 has the token id 128 in place 2.*ids 0 to 127"),
        ({"input_ids": [[5, -100]]}, cpattn.CPError, "prompt 0 has the token id -100 in place 1"),
        (
            {"input_ids": torch.tensor([[5, 9, 1]]), "pad_token_id": 1},
            cpattn.CPError,
            "no attention_mask, so that pad_token_id=1 is padding.*zeros after a token",
        ),
        ({"input_ids": torch.ones(3)}, cpattn.TensorMismatchError, "input_ids is torch.float32"),
        ({"input_ids": torch.ones(3, dtype=torch.int64)}, cpattn.RowCountError, r"input_ids has shape \(3,\); pass \[batch, length\]"),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1, 0]])},
            cpattn.CPError,
            "zeros after a token; padding goes on the left",
        ),
        (
            {"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 2)},
            cpattn.RowCountError,
            r"attention_mask is of shape \(1, 2\)",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(model: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    given = {"input_ids": [[5, 3]], "max_new_tokens": 2, **options}
    with pytest.raises(kind, match=message):
        cpattn_hf.generate(model, **given)


def test_options_come_from_the_models_generation_config(model: Any) -> None:
    """The nearest that says it counts; what says the same as saying nothing is taken."""
    model.generation_config = transformers.GenerationConfig(max_new_tokens=2, num_beams=1, cache_implementation="hybrid", bos_token_id=3)
    assert len(cpattn_hf.generate(model, [[5, 3]])[0]) == 4
    assert len(cpattn_hf.generate(model, [[5, 3]], generation_config=transformers.GenerationConfig(max_new_tokens=3))[0]) == 5
    assert len(cpattn_hf.generate(model, [[5, 3]], max_new_tokens=1, streamer=None, num_beams=1)[0]) == 3


def test_a_model_with_another_attention(model: Any) -> None:
    model.set_attn_implementation("sdpa")
    with pytest.raises(cpattn_hf.ContextError, match="no layer called cpattn's attention"):
        cpattn_hf.generate(model, [[5, 3]], max_new_tokens=2)


def test_check_finds_ranks_that_ask_for_other_things(model: Any) -> None:
    def run(group: Any) -> str:
        with pytest.raises(cpattn.DisagreementError) as raised:
            cpattn_hf.generate(model, [[5, 3]], group=group, max_new_tokens=2 + group.rank, check=True)
        return str(raised.value)

    assert all("the ranks disagree on the arguments" in message for message in run_loopback(run, 2))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotations_by_the_longest_sequence(rope_type: str) -> None:
    cpattn_hf.register()
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 16}
    model = hf_cases.new_model("llama", max_position_embeddings=16, rope_parameters=rope)
    model.set_attn_implementation("cpattn")
    assert len(cpattn_hf.generate(model, [[5] * 14], max_new_tokens=3)[0]) == 17
    with pytest.raises(cpattn.UnsupportedError, match=rf"a sequence has 17 tokens, and the model's rope type '{rope_type}'"):
        cpattn_hf.generate(model, [[5] * 14], max_new_tokens=4)
    with (
        pytest.raises(cpattn.UnsupportedError, match="takes other frequencies beyond 16"),
        cpattn_hf.context_parallel(model, cpattn.build_metadata([(0, 17)], 1, 0)),
    ):
        pass


# The examples.


def test_the_example_that_generates() -> None:
    cpattn_hf.register()
    example = runpy.run_path(str(EXAMPLES / "hf_generate.py"))
    model = example["make_model"](torch.device("cpu"))
    assert run_loopback(lambda group: example["run"](model, group, group.rank), 2) == [True, True]


def save(model: Any, folder: Path) -> list[str]:
    """The model, and a tokenizer whose words are the model's tokens; returns the words."""
    words = [f"w{number}" for number in range(128)]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    model.save_pretrained(folder)
    return words


def test_the_example_goes_on_with_texts(model: Any, tmp_path: Path) -> None:
    words = save(model, tmp_path)
    example = runpy.run_path(str(EXAMPLES / "hf_generate.py"))
    texts = example["continue_texts"](str(tmp_path), ["w5 w17 w3", "w11"], 4, None, torch.device("cpu"))
    expected = [own_answer(model, torch.tensor(prompt), max_new_tokens=4).tolist() for prompt in ([5, 17, 3], [11])]
    assert texts == [" ".join(words[token] for token in tokens) for tokens in expected]


def test_the_example_of_perplexity_takes_a_text(model: Any, tmp_path: Path) -> None:
    save(model, tmp_path)
    (tmp_path / "text").write_text("w5 w17 w3\nw11 w2")
    example = runpy.run_path(str(EXAMPLES / "perplexity.py"))
    loaded, ids = example["load"](str(tmp_path), tmp_path / "text", 4, torch.device("cpu"))
    assert ids.tolist() == [5, 17, 3, 11]
    example["check_head"](loaded, ids, None, 0, 1)
    assert example["mean_loss"](loaded, ids, None, 0, 1) == pytest.approx(example["own_loss"](model, ids), abs=1e-4)
    capped = hf_cases.new_model("gemma2")
    capped.set_attn_implementation("cpattn")
    with pytest.raises(SystemExit, match="Gemma2ForCausalLM does more to its logits than its head"):
        example["check_head"](capped, ids, None, 0, 1)


def test_the_example_of_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    cpattn_hf.register()
    example = runpy.run_path(str(EXAMPLES / "perplexity.py"))
    monkeypatch.setitem(example["mean_loss"].__globals__, "ROWS_AT_A_TIME", 64)
    model, ids = example["make_model"](torch.device("cpu"), 1009), example["read_text"](1009, torch.device("cpu"))
    losses = run_loopback(lambda group: example["mean_loss"](model, ids, group, group.rank, 3), 3)
    assert len(set(losses)) == 1
    assert losses[0] == pytest.approx(example["own_loss"](model, ids), abs=1e-4)
