"""The order in which a rank gives up what it shares with the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pla_serve.engine.parallel import ranks as module
from pla_serve.engine.parallel.ranks import TorchRanks


@pytest.mark.parametrize(
    ("device", "alone", "order"),
    [
        ("cpu", False, ["graphs", "process group"]),
        ("cpu", True, ["graphs", "process group"]),
        ("cuda", False, ["graphs", "process group"]),
        ("cuda", True, []),
    ],
)
def test_graphs_are_given_up_before_the_process_group(
    device: str, alone: bool, order: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NCCL waits for graphs that use its communicator; with the others gone, both would hang."""
    done: list[str] = []

    def init(*args: Any, **kwargs: Any) -> None:
        assert not done

    monkeypatch.setattr(module.dist, "init_process_group", init)
    monkeypatch.setattr(module.dist, "destroy_process_group", lambda: done.append("process group"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    ranks = TorchRanks(tmp_path, 0, 1, torch.device(device))
    ranks.before_leaving(lambda: done.append("graphs"))
    ranks.close(alone)
    assert done == order
