"""What needs no engine: refusals, and the bound on run-ahead on a device that computes late."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pla_serve.plugins.vllm.preemption import refusals
from pla_serve.plugins.vllm.preemption.pace import HostPace


def config_of(**changed: Any) -> Any:
    """A configuration with which steps can be left, but for what is changed, as ``part__name``."""
    values: dict[str, dict[str, Any]] = {
        "parallel_config": {
            "data_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "enable_eplb": False,
            "use_ubatching": False,
        },
        "scheduler_config": {"async_scheduling": False},
        "model_config": {
            "is_moe": False,
            "is_multimodal_model": False,
            "enable_prompt_embeds": False,
        },
        "cache_config": {"kv_sharing_fast_prefill": False},
    }
    whole: dict[str, Any] = {
        "use_v2_model_runner": False,
        "speculative_config": None,
        "lora_config": None,
        "kv_transfer_config": None,
        "ec_transfer_config": None,
    }
    for name, value in changed.items():
        part, _, field = name.partition("__")
        if field:
            values[part][field] = value
        else:
            whole[name] = value
    return SimpleNamespace(**whole, **{key: SimpleNamespace(**it) for key, it in values.items()})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, None),
        ({"parallel_config__data_parallel_size": 2}, "data parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "context parallelism"),
        ({"parallel_config__enable_eplb": True}, "expert load balancing"),
        ({"parallel_config__use_ubatching": True}, "dual-batch overlap"),
        ({"scheduler_config__async_scheduling": True}, "--no-async-scheduling"),
        ({"use_v2_model_runner": True}, "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"lora_config": object()}, "LoRA"),
        ({"kv_transfer_config": object()}, "KV connectors"),
        ({"ec_transfer_config": object()}, "encoder connectors"),
        ({"model_config__is_moe": True}, "mixtures of experts"),
        ({"model_config__is_multimodal_model": True}, "multimodal"),
        ({"model_config__enable_prompt_embeds": True}, "prompt embeddings"),
        ({"cache_config__kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    ],
)
def test_what_steps_cannot_be_left_with_is_named(
    changed: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "installed_version", lambda: "0.32.1")
    found = refusals.why_not(config_of(**changed))
    assert found is None if reason is None else reason in str(found)


def test_a_release_that_was_not_tested_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "installed_version", lambda: "0.33.0")
    assert "0.33.0" in str(refusals.why_not(config_of()))


class LateDevice:
    """Computes nothing until somebody waits for it, and then in order."""

    def __init__(self) -> None:
        self.enqueued = 0
        self.done = 0

    def event(self) -> LateEvent:
        return LateEvent(self)


class LateEvent:
    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self._mark = 0

    def record(self) -> None:
        self._mark = self._device.enqueued

    def synchronize(self) -> None:
        self._device.done = max(self._device.done, self._mark)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_the_host_is_never_further_ahead_than_the_bound(layers: int) -> None:
    device = LateDevice()
    ahead = HostPace(device.event, layers)
    most = 0
    for _ in range(2):
        for _ in range(30):
            ahead.pace()
            most = max(most, device.enqueued - device.done)
            device.enqueued += 1
        ahead.end()
        device.done = device.enqueued  # whoever needs the step's tokens waits for all of it
    assert most == layers


def test_a_device_that_computes_at_once_needs_no_marks() -> None:
    HostPace(None).pace()
