"""What lets the GPU tests use all GPUs of a machine."""

from __future__ import annotations

import pickle

import torch
from devices.gpu_workers import rotated
from inputs.cases import AttentionCase


def test_workers_begin_at_different_gpus() -> None:
    assert [rotated("0,1", f"gw{n}") for n in range(4)] == ["0,1", "1,0", "0,1", "1,0"]
    assert rotated("GPU-aa,GPU-bb,GPU-cc", "gw2") == "GPU-cc,GPU-aa,GPU-bb"
    assert rotated("3", "gw7") == "3"


def test_a_case_is_sent_through_the_cpu_and_comes_to_lie_on_the_receivers_device() -> None:
    case = AttentionCase([(5, 30), (0, 3)], sinks=True, window=4)
    expected, _ = case.expected
    restored = pickle.loads(pickle.dumps(case))
    assert restored.batch == case.batch
    assert torch.equal(restored.q, case.q)
    assert torch.equal(restored.expected[0], expected)
    state = case.__getstate__()
    assert {x.device.type for x in state.values() if isinstance(x, torch.Tensor)} == {"cpu"}
    # The name of a device says which kind; which one of them is up to whoever receives it.
    restored.__setstate__(state | {"device": "meta"})
    tensors = [restored.q, restored.k, restored.v, restored.prefix_k, *restored.expected, restored.options["sinks"]]
    assert {x.device.type for x in tensors} == {"meta"}
    assert restored.options["window"] == 4
