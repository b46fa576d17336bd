from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from pla_serve.policy.config import PolicyConfig
from pla_serve.simulator.machine import KnownCost, MachineError, known_machines, load_machine


@pytest.mark.parametrize("name", known_machines())
def test_every_machine_that_comes_along_is_plausible(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    cost = KnownCost(machine.profile)
    step, batch = cost.work_seconds(1, 0, 0, 1, 1), cost.prefill_seconds(8192, 0)
    assert 1e-3 < step < 0.05 < batch < 2
    chip = machine.roofline
    assert chip is not None
    assert chip.weight_bytes == pytest.approx(2 * chip.parameters, rel=0.02)
    assert chip.layers == machine.layers
    assert chip.kv_bytes_per_token == machine.kv_bytes_per_token


def test_a_published_time() -> None:
    """arXiv 2601.11589: 8,192 tokens take 0.75 s; the model counts attention on top."""
    cost = KnownCost(load_machine("h200-qwen2.5-32b").profile)
    assert cost.prefill_seconds(8192, 0) == pytest.approx(0.75, rel=0.08)


def test_kv_takes_its_time() -> None:
    machine = load_machine("h200-qwen2.5-32b")
    assert machine.transfer(1000) == pytest.approx(0.001 + 1000 * 262144 / 40e9)


def machine_file(tmp_path: Path, **changes: object) -> str:
    content: dict[str, object] = {
        "name": "mine",
        "source": "measured",
        "layers": 4,
        "kv_tokens": 1000,
        "kv_bytes_per_token": 10,
        "transfer_bytes_per_second": 1e9,
        "transfer_seconds": 0.001,
        "seconds": {
            "per_token": 1e-4,
            "per_attention": 0,
            "per_kv": 0,
            "per_sequence": 0,
            "per_launch": 1e-2,
        },
    }
    path = tmp_path / "mine.json"
    path.write_bytes(msgspec.json.encode(content | changes))
    return str(path)


def test_a_file(tmp_path: Path) -> None:
    machine = load_machine(machine_file(tmp_path))
    assert machine.profile.per_launch == 0.01
    assert machine.max_batch_tokens == PolicyConfig().max_batch_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be at least 1"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be at least 1"),
        ({"seconds": None}, "needs either 'roofline' or 'seconds'"),
        ({"speed": 3}, "unknown field `speed`"),
        ({"transfer_bytes_per_second": 0}, "must be positive"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(MachineError, match=message):
        load_machine(machine_file(tmp_path, **changes))


def test_a_machine_that_is_not_there() -> None:
    with pytest.raises(MachineError, match=r"known are: .*h200-qwen2\.5-32b"):
        load_machine("tpu")
    with pytest.raises(MachineError, match="cannot read"):
        load_machine("nowhere.json")
