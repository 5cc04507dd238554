"""Which kernel and which launch each release of Triton gets, and what is said about it."""

from __future__ import annotations

import threading
import time
import warnings
from typing import Any

import pytest
import torch
from inputs.problems import problem

from cpattn.attention import triton as backend
from cpattn.kernels import release
from cpattn.kernels.release import KNOWN, Gate, Release, SlowKernelWarning, Verdict, describe, parse_release, warn_if_slow

DEVICE = torch.device("cuda", 0)
NOT_KNOWN = max(KNOWN)[0], max(KNOWN)[1] + 1


def gate(at: Release | None, problem: Any = None, precondition: str | None = None, known: dict[Release, str | None] | None = None) -> Gate:
    """A gate of a Triton of that release; ``problem`` is what a check returns or raises."""

    def check(device: torch.device) -> str | None:
        if isinstance(problem, Exception):
            raise problem
        assert device == DEVICE
        result: str | None = problem
        return result

    return Gate({(3, 5): "no such thing", (3, 6): None} if known is None else known, check, lambda: precondition, lambda: at)


@pytest.mark.parametrize(
    ("version", "expected"),
    [("3.6.0", (3, 6)), ("3.10.0rc1", (3, 10)), ("3.8.0+git0a1b", (3, 8)), ("3.7", (3, 7)), ("main", (0, 0))],
)
def test_versions(version: str, expected: Release) -> None:
    assert parse_release(version) == expected


@pytest.mark.parametrize(
    ("of", "used", "why"),
    [
        (gate((3, 6)), True, "tested with Triton 3.6"),
        (gate((3, 5)), False, "Triton 3.5 cannot: no such thing"),
        (gate((3, 4)), False, "Triton 3.4 is older than 3.5"),
        (gate((3, 10)), True, "Triton 3.10 is not known yet; the self-check passed"),
        (gate((4, 0), "wrong bits"), False, "Triton 4.0 is not known yet, and the self-check failed: wrong bits"),
        (gate((4, 0), ImportError("no Gluon\nhere")), False, "the self-check failed: ImportError: no Gluon"),
        (gate((4, 0), AssertionError()), False, "the self-check failed: AssertionError: "),
        (gate(None), False, "Triton's interpreter runs the kernels"),
        (gate((3, 6), precondition="no driver"), False, "no driver"),
    ],
    ids=[
        "known",
        "known not to work",
        "older",
        "newer and right",
        "newer and wrong",
        "raises",
        "raises nothing said",
        "interpreted",
        "driver",
    ],
)
def test_each_kind_of_release(of: Gate, used: bool, why: str) -> None:
    assert of.is_open(DEVICE) is used
    assert of.is_open(DEVICE) is used
    assert of.verdict().used is used
    assert why in of.verdict().why


def test_all_known_releases_are_what_was_measured() -> None:
    """Hardware decides what stands there; this holds what others rely on."""
    assert {at: known.hopper_kernel is None for at, known in KNOWN.items()} == {
        (3, 5): False, (3, 6): True, (3, 7): True, (3, 8): True, (3, 9): True,
    }  # fmt: skip


@pytest.mark.parametrize(("at", "expected"), [(None, True), ((3, 6), True), (max(KNOWN), True), ((3, 99), False), ((4, 0), False)])
def test_registers_are_limited_where_the_release_is_known(at: Release | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of kernels whose warps have roles; a wrong number would have them wait without end."""
    monkeypatch.setattr(release, "running_release", lambda: at)
    assert release.may_limit_registers() is expected


def test_a_missing_triton_is_no_error() -> None:
    def missing() -> Release | None:
        raise ImportError("No module named 'triton'")

    assert Gate({(3, 6): None}, lambda device: None, release=missing).verdict() == Verdict(
        False, "Triton cannot be imported: No module named 'triton'"
    )


def test_before_the_check_it_says_that_there_will_be_one() -> None:
    of = gate((3, 10))
    assert of.verdict() == Verdict(None, "Triton 3.10 is not known yet: a self-check at first use decides")
    of.is_open(DEVICE)
    assert of.verdict().used is True


def test_nothing_is_checked_while_a_graph_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    of = gate((3, 10))
    with monkeypatch.context() as capture:
        capture.setattr(release, "is_capturing", lambda device: True)
        assert not of.is_open(DEVICE)
    assert of.verdict().used is None
    assert of.is_open(DEVICE)


def test_the_check_runs_once_and_others_wait_for_it() -> None:
    checks: list[bool] = []

    def check(device: torch.device) -> str | None:
        # What it launches asks, too.
        checks.append(of.is_open(device))
        time.sleep(0.05)
        return "wrong"

    of = Gate({(3, 6): None}, check, release=lambda: (3, 7))
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.append(of.is_open(DEVICE))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert checks == [True]
    assert answers == [False] * 4


@pytest.fixture(autouse=True)
def nothing_captures(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(release, "is_capturing", lambda device: False)


def set_gates(monkeypatch: pytest.MonkeyPatch, kernel: Gate, launch: Gate) -> None:
    monkeypatch.setattr(release, "HOPPER_KERNEL", kernel)
    monkeypatch.setattr(release, "DIRECT_LAUNCH", launch)
    monkeypatch.setattr(release, "_warned", threading.Event())


@pytest.mark.parametrize(
    ("kernel", "launch", "hopper", "expected"),
    [
        (gate((3, 6)), gate((3, 6)), True, "the kernel for Hopper, launched by the CUDA driver"),
        (gate((3, 6)), gate((3, 6)), False, "launched by the CUDA driver"),
        (gate((3, 5)), gate((3, 6)), True, "the plain kernel (Triton 3.5 cannot: no such thing), launched by the CUDA driver"),
        (gate((3, 6)), gate((3, 6), precondition="no driver"), True, "the kernel for Hopper, launched by Triton (no driver)"),
        (
            gate((3, 10)), gate((3, 6)), True,
            "the kernel for Hopper or not (Triton 3.10 is not known yet: a self-check at first use decides), launched by the CUDA driver",
        ),
    ],
    ids=["fast", "fast elsewhere", "plain kernel", "launched by Triton", "to be checked"],
)  # fmt: skip
def test_explain_says_which(monkeypatch: pytest.MonkeyPatch, kernel: Gate, launch: Gate, hopper: bool, expected: str) -> None:
    set_gates(monkeypatch, kernel, launch)
    assert describe(hopper) == expected
    monkeypatch.setattr(backend, "capability", lambda device: (9, 0) if hopper else (8, 0))
    asked = problem(DEVICE, torch.bfloat16, head_dim=128, v_head_dim=128)
    assert backend.BACKEND.how(asked) == expected


@pytest.mark.parametrize(
    ("changes", "is_hopper"),
    [({}, True), ({"page_size": 64}, True), ({"page_size": 24}, False), ({"dtype": torch.float32}, False), ({"head_dim": 32}, False)],
    ids=str,
)
def test_explain_names_the_kernel_only_where_it_could_serve(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], is_hopper: bool
) -> None:
    set_gates(monkeypatch, gate((3, 6)), gate((3, 6)))
    monkeypatch.setattr(backend, "capability", lambda device: (9, 0))
    arguments: dict[str, Any] = {"dtype": torch.bfloat16, "head_dim": 128, "v_head_dim": 128, "page_size": None} | changes
    asked = problem(DEVICE, **arguments)
    assert ("kernel for Hopper" in str(backend.BACKEND.how(asked))) == is_hopper


@pytest.mark.parametrize(
    ("dims", "specialized", "said"),
    [
        ((128, 128), True, ""),
        ((192, 128), True, ""),
        ((192, 128), False, ", head dim 192 is computed as 256"),
        ((160, 160), True, ", head dim 160 is computed as 256"),
        ((80, 80), True, ", head dim 80 is computed as 128"),
        ((576, 512), False, ""),
    ],
)
def test_what_head_dims_are_padded_to(dims: tuple[int, int], specialized: bool, said: str) -> None:
    assert backend._padding(problem(head_dim=dims[0], v_head_dim=dims[1]), specialized) == said


def test_it_warns_once_with_all_that_is_slow_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    set_gates(monkeypatch, gate((3, 5)), gate((3, 5)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            warn_if_slow(has_hopper_kernel=True)
    assert [warning.category for warning in caught] == [SlowKernelWarning]
    text = str(caught[0].message)
    assert "the plain kernel runs instead of the one for Hopper, at about four fifths of its speed, since Triton 3.5 cannot" in text
    assert "launches go through Triton, which takes two to three times as long on the host, since Triton 3.5 cannot" in text
    assert "Known to be fast are Triton 3.6 to " in text


@pytest.mark.parametrize(
    ("kernel", "launch", "hopper", "said"),
    [
        (gate((3, 6)), gate((3, 6)), True, None),
        (gate((3, 10)), gate((3, 10)), True, None),
        (gate((3, 5)), gate((3, 6)), False, None),
        (gate((3, 5)), gate((3, 6)), True, "plain kernel"),
        (gate((3, 5)), gate((3, 6), precondition="no driver"), False, "launches go"),
    ],
    ids=["all is fast", "not checked yet", "no kernel for this GPU", "kernel", "launch"],
)
def test_it_warns_of_what_this_gpu_could_do_better(
    monkeypatch: pytest.MonkeyPatch, kernel: Gate, launch: Gate, hopper: bool, said: str | None
) -> None:
    set_gates(monkeypatch, kernel, launch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_slow(hopper)
    texts = [str(warning.message) for warning in caught]
    assert [said in text for text in texts] == [True] * (said is not None) if said else texts == []


# ---- on a GPU


@pytest.fixture
def gpu(device: str) -> torch.device:
    if device == "cpu":
        pytest.skip("needs a GPU")
    # What takes the two ways has brought its checks.
    from cpattn.kernels import ragged_attention

    assert ragged_attention
    return torch.device("cuda", torch.cuda.current_device())


def test_the_checks_pass_where_the_release_is_known(gpu: torch.device) -> None:
    """They are what a release to come is trusted by. Twice, as kernels that are compiled already must not mislead them."""
    at = release.running_release()
    assert at in KNOWN
    state = torch.cuda.get_rng_state()
    for _ in range(2):
        if release.DIRECT_LAUNCH.verdict().used:
            assert release.DIRECT_LAUNCH.check(gpu) is None
        if release.HOPPER_KERNEL.verdict().used and torch.cuda.get_device_capability() == (9, 0):
            assert release.HOPPER_KERNEL.check(gpu) is None
    assert torch.equal(torch.cuda.get_rng_state(), state)


@pytest.mark.parametrize("name", ["DIRECT_LAUNCH", "HOPPER_KERNEL"])
def test_a_release_that_is_not_known_is_found_right(gpu: torch.device, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    known = getattr(release, name)
    if not known.verdict().used or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("is not used here")
    monkeypatch.setattr(known, "_verdict", None)
    monkeypatch.setattr(known, "_release", lambda: NOT_KNOWN)
    assert known.verdict().used is None
    assert known.is_open(gpu), known.verdict().why
    assert "the self-check passed" in known.verdict().why


def test_a_launch_that_goes_wrong_is_found_out(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the release passed numbers in another way."""
    from cpattn.kernels import direct_launch

    if not release.DIRECT_LAUNCH.verdict().used:
        pytest.skip("is not used here")
    right = direct_launch._word
    monkeypatch.setattr(direct_launch, "_word", lambda value: right(value + 1) if type(value) is int else right(value))
    assert release.DIRECT_LAUNCH.check(gpu) == "a launch by the CUDA driver gave another result than one by Triton"


def test_a_rule_of_specialization_that_changed_is_found_out(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Triton told fewer numbers apart than we do, or more."""
    from cpattn.kernels import launch

    if not release.DIRECT_LAUNCH.verdict().used:
        pytest.skip("is not used here")
    right = launch._kinds

    def more_kinds(arguments: dict[str, Any], roles: dict[str, str]) -> list[Any]:
        return [*right(arguments, roles), *(value for value in arguments.values() if type(value) is int)]

    monkeypatch.setattr(launch, "_kinds", more_kinds)
    assert release.DIRECT_LAUNCH.check(gpu) == "kernels are specialized on something else"


def test_a_wrong_kernel_is_found_out(gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if not release.HOPPER_KERNEL.verdict().used or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("is not used here")
    from cpattn.kernels import hopper_attention

    right = hopper_attention.launch

    def wrong(*args: Any, arguments: dict[str, Any], **others: Any) -> Any:
        return right(*args, arguments=arguments | {"exponent_scale": arguments["exponent_scale"] * 1.01}, **others)

    monkeypatch.setattr(hopper_attention, "launch", wrong)
    assert "its error is" in str(release.HOPPER_KERNEL.check(gpu))
