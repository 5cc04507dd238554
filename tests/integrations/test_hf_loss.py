"""The loss of a sharded model is that of the plain one, and each rank's is its share of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from programs import hf_cases
from torch import Tensor, nn

import cpattn
from cpattn.integrations import transformers as cpattn_hf
from cpattn.integrations.transformers.labels import BatchLabels
from cpattn.testing import run_loopback

# Prime lengths, requests without a label, and none at all.
BATCH = [(0, 29), (0, 1), (0, 0), (0, 3), (0, 13), (0, 2)]
IDS = hf_cases.token_ids(BATCH)
FEW = torch.where(torch.arange(len(IDS)) == 5, IDS, -100)


def shares_of(model: Any, labels: Tensor, plan: cpattn.Plan) -> list[tuple[Tensor, Tensor]]:
    cpattn_hf.register()
    model.set_attn_implementation("cpattn")
    return run_loopback(lambda group: hf_cases.sharded_loss(model, labels, plan, group, group.rank), plan.cp_size)


@pytest.mark.parametrize("labels", [IDS, hf_cases.labels_of(IDS), FEW], ids=["all", "some", "one"])
@pytest.mark.parametrize("cp_size", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3", "gpt_oss"])
def test_the_loss_is_the_plain_models(family: str, cp_size: int, labels: Tensor) -> None:
    model = hf_cases.model_of(family)
    expected = hf_cases.plain_loss(model, labels, IDS, BATCH)
    results = shares_of(model, labels, cpattn.plan(BATCH, cp_size, pad_to=4))
    shares, losses = zip(*results, strict=True)
    assert all(torch.equal(loss, losses[0]) for loss in losses)
    torch.testing.assert_close(losses[0], expected)
    torch.testing.assert_close(sum(shares), expected)
    if labels is FEW:
        assert sorted(share > 0 for share in shares) == [False] * (cp_size - 1) + [True]


def test_one_request_as_transformers_computes_it() -> None:
    model, ids = hf_cases.model_of("llama"), IDS[:29]
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(ids[None], labels=ids[None]).loss
    assert torch.equal(hf_cases.token_ids([(0, 29)]), ids)
    for _, loss in shares_of(model, ids, cpattn.plan([(0, 29)], 2)):
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("labels", [torch.full_like(IDS, -100), IDS], ids=["none", "all of requests of one token"])
def test_a_batch_without_labels(labels: Tensor) -> None:
    batch = BATCH if labels is not IDS else [(0, 1)] * 3
    plan = cpattn.plan(batch, 2)
    for share, loss in shares_of(hf_cases.model_of("llama"), labels[: plan.num_tokens], plan):
        assert share == 0
        assert loss == 0


def test_more_ranks_than_tokens() -> None:
    model, plan = hf_cases.model_of("llama"), cpattn.plan([(0, 3)], 3, partition="contiguous")
    labels = IDS[:3]
    results = shares_of(model, labels, plan)
    assert results[-1][0] == 0
    torch.testing.assert_close(results[0][1], hf_cases.plain_loss(model, labels, hf_cases.token_ids(plan.batch), plan.batch))


@pytest.mark.parametrize("cp_size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[1], [0, 2, 0], [23, 1, 0, 2, 5], [1] * 5], ids=str)
def test_labels(lengths: list[int], cp_size: int) -> None:
    plan = cpattn.plan([(0, length) for length in lengths], cp_size, pad_to=4)
    tokens = torch.arange(plan.num_tokens, dtype=torch.int32)
    nexts = [torch.cat([ids[1:], ids.new_full((1,), -100)]) for ids in torch.split(tokens, lengths) if len(ids)]
    for rank in range(cp_size):
        meta = plan.metadata(rank)
        is_token = torch.arange(meta.rows) < meta.num_tokens
        made = BatchLabels(meta, is_token).shift(tokens)
        assert made.dtype == torch.int64
        assert made.shape == (1, meta.rows)
        assert made[0, is_token].tolist() == cpattn.shard(torch.cat(nexts), meta)[is_token].tolist()
        assert (made[0, ~is_token] == -100).all()


def test_a_compiled_model() -> None:
    """In inference mode: test_hf_logits.py."""
    torch._dynamo.reset()
    cpattn_hf.register()
    model = hf_cases.new_model("llama")
    batches = [IDS, IDS[:20], IDS[:7]]
    expected = [hf_cases.plain_loss(model, ids, ids, [(0, len(ids))]) for ids in batches]
    model.set_attn_implementation("cpattn")
    compiled: Any = torch.compile(model, backend="eager")
    for ids, loss in zip(batches, expected, strict=True):
        with torch.no_grad(), cpattn_hf.context_parallel(compiled, cpattn.build_metadata([(0, len(ids))], 1, 0)) as cp:
            inputs = cp.inputs(ids)
            logits = cp.gather(compiled(**inputs).logits)
            outputs = compiled(**inputs, shift_labels=cp.labels(ids))
            torch.testing.assert_close(cp.loss(outputs), loss)
            torch.testing.assert_close(cp.gather(outputs.logits), logits)
            with pytest.raises(cpattn.UnsupportedError, match="was called with labels, which it would shift"):
                compiled(**inputs, labels=ids[None])
    torch._dynamo.reset()


class Wrapper(nn.Module):
    """As those of PEFT do, it calls the model's forward, which hooks do not see."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **arguments: Any) -> Any:
        return self.inner.forward(**arguments)


@pytest.fixture
def model() -> Any:
    cpattn_hf.register()
    llama = hf_cases.new_model("llama")
    llama.set_attn_implementation("cpattn")
    return llama


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


def context(model: Any, **options: Any) -> Any:
    return cpattn_hf.context_parallel(model, cpattn.build_metadata(BATCH, 1, 0), **options)


@pytest.mark.parametrize("wrapped", [False, True], ids=["itself", "wrapped"])
def test_labels_that_the_model_would_shift(model: Any, wrapped: bool) -> None:
    called = Wrapper(model) if wrapped else model
    message = r"called with labels, which it would shift within this rank's rows.*pass shift_labels=cp.labels\(labels\)"
    with context(called) as cp:
        with pytest.raises(cpattn.UnsupportedError, match=message):
            called(**cp.inputs(IDS), labels=IDS[None])
        if not wrapped:
            with pytest.raises(cpattn.UnsupportedError, match=message):  # by its place
                model(*cp.inputs(IDS).values(), None, IDS[None])
        cp.loss(called(**cp.inputs(IDS), shift_labels=cp.labels(IDS)))


@pytest.mark.parametrize("given", ["shift_labels", "both", "a view", "the number as well"])
def test_ways_to_give_labels(model: Any, given: str) -> None:
    with context(model, check=True) as cp:
        labels = cp.labels(IDS[None])
        arguments: dict[str, Any] = {"shift_labels": labels[0] if given == "a view" else labels}
        if given == "both":
            arguments["labels"] = labels
        if given == "the number as well":
            arguments = {"shift_labels": labels.clone(), "num_items_in_batch": 43}
        outputs = model(**cp.inputs(IDS), **arguments)
        torch.testing.assert_close(cp.loss(outputs), hf_cases.plain_loss(hf_cases.model_of("llama"), IDS, IDS, BATCH))
        assert torch.equal(cp.loss(outputs.loss), cp.loss(outputs))


def _written_to(labels: Tensor) -> Tensor:
    return labels.fill_(-100)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda labels: labels.clone(), cpattn.UnsupportedError, "were not made by cp.labels of this context.*num_items_in_batch="),
        (_written_to, cpattn.UnsupportedError, "have been written to since cp.labels made them"),
        (lambda labels: labels[:, 1:], cpattn.RowCountError, r"shift_labels is of shape \(1, 47\), but this rank has \[1, 48\] rows"),
        (lambda labels: labels.tolist(), cpattn.RowCountError, "shift_labels is a list"),
    ],
    ids=["own", "written to", "too few", "list"],
)
def test_shift_labels_that_are_refused(model: Any, change: Any, kind: type[Exception], message: str) -> None:
    with context(model) as cp:
        with pytest.raises(kind, match=message):
            model(**cp.inputs(IDS), shift_labels=change(cp.labels(IDS)))
        model(**cp.inputs(IDS))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (IDS[:-1], r"labels has shape \(47,\), but the batch has 48 new tokens"),
        (IDS.view(2, 24), r"labels has shape \(2, 24\)"),
        (IDS.float(), "labels is torch.float32"),
        (IDS.to("meta"), "labels is on meta"),
    ],
    ids=["short", "rows", "float", "device"],
)
def test_labels_that_are_none(model: Any, labels: Tensor, message: str) -> None:
    with context(model) as cp, pytest.raises(cpattn.CPError, match=message):
        cp.labels(labels)


def test_a_loss_that_is_none(model: Any) -> None:
    with context(model) as cp:
        with pytest.raises(cpattn_hf.ContextError, match="no layer called cpattn's attention"):
            cp.loss(torch.ones(()))
        outputs = model(**cp.inputs(IDS))
        with pytest.raises(cpattn_hf.ContextError, match=r"CausalLMOutputWithPast has no loss.*shift_labels=cp.labels\(input_ids\)"):
            cp.loss(outputs)
        with pytest.raises(cpattn.TensorMismatchError, match=r"the loss is torch.float32 \(1, 48, 128\)"):
            cp.loss(outputs.logits)


def test_only_last_logits(model: Any) -> None:
    with context(model) as cp:
        with pytest.raises(cpattn.UnsupportedError, match=r"last_only=True.*a loss needs all of them"):
            model(**cp.inputs(IDS, last_only=True), shift_labels=cp.labels(IDS))
        model(**cp.inputs(IDS))


def test_a_loss_about_experts() -> None:
    cpattn_hf.register()
    experts = hf_cases.new_model("gpt_oss", output_router_logits=True)
    experts.set_attn_implementation("cpattn")
    with context(experts) as cp:
        with pytest.raises(cpattn.UnsupportedError, match=r"how evenly this rank's rows use its experts.*output_router_logits=False"):
            experts(**cp.inputs(IDS), shift_labels=cp.labels(IDS))
        cp.loss(experts(**cp.inputs(IDS), shift_labels=cp.labels(IDS), output_router_logits=False))


class OwnLoss(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """Shifts labels itself, as older models do."""

    def forward(self, input_ids: Tensor, labels: Any = None, **arguments: Any) -> Any:
        outputs = super().forward(input_ids, **arguments)
        if labels is not None:
            labels = labels.to(outputs.logits.device)
            outputs.loss = nn.functional.cross_entropy(outputs.logits[0, :-1], labels[0, 1:])
        return outputs


class OwnPaddedLoss(OwnLoss):
    def forward(self, input_ids: Tensor, labels: Any = None, **arguments: Any) -> Any:
        return self.loss_function(torch.zeros(1, 48, 128), nn.functional.pad(labels, (0, 1)), 128)


@pytest.mark.parametrize("kind", [OwnLoss, OwnPaddedLoss])
def test_a_model_that_shifts_labels_itself(kind: Any, model: Any) -> None:
    own = kind(model.config).eval()
    with context(own) as cp:
        with pytest.raises(cpattn.UnsupportedError, match="computes its loss from labels, not from shift_labels"):
            own(**cp.inputs(IDS), shift_labels=cp.labels(IDS))
        transformers.LlamaForCausalLM.forward(own, **cp.inputs(IDS))


def test_the_model_is_left_as_it_was(model: Any) -> None:
    with context(model):
        assert "forward" in vars(model)
    assert "forward" not in vars(model)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return type(model).forward(model, *args, **kwargs)

    model.forward = replaced
    with context(model) as cp:
        cp.loss(model(**cp.inputs(IDS), shift_labels=cp.labels(IDS)))
    assert model.forward is replaced
