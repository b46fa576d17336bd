"""Rank 1 of the tests: follows rank 0 with several models, each by a command stream of its own."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from pla_serve.engine.build.rank import BuiltRank, build_rank
from pla_serve.engine.build.settings import build_settings
from pla_serve.engine.config import EngineConfig
from pla_serve.engine.loading import NoLoadingProgress, resolve
from pla_serve.engine.parallel.commands import CommandReceiver, End
from pla_serve.engine.parallel.following import follow
from pla_serve.engine.parallel.ranks import Ranks, TorchRanks
from pla_serve.engine.parallel.team import FollowerLaunch

CPU = torch.device("cpu")
SHAPES = {"captured": "1x1,4x4,16x4,32x8"}
"""Shapes of models that run short batches as a whole."""


def load_all(config: EngineConfig, ranks: Ranks) -> dict[str, BuiltRank]:
    """Each model in the folder ``config.model``, by name; the same on each rank."""
    loaded = {}
    for folder in sorted(Path(config.model).iterdir()):
        own = replace(config, model=str(folder), capture_shapes=SHAPES.get(folder.name))
        source = resolve(own.model, own.load_format, progress=NoLoadingProgress())
        loaded[folder.name] = build_rank(build_settings(own, source, CPU, time.monotonic, ranks))
    return loaded


def command_folder(folder: str | Path, name: str) -> Path:
    """Results of the command stream for one model."""
    path = Path(folder) / name
    path.mkdir(exist_ok=True)
    return path


def main() -> None:
    launch = msgspec.json.decode(sys.stdin.buffer.readline(), type=FollowerLaunch)
    torch.set_num_threads(1)
    names = sorted(path.name for path in Path(launch.config.model).iterdir())
    receivers = [CommandReceiver(command_folder(launch.folder, name), 1) for name in names]
    finish = CommandReceiver(Path(launch.folder), 1)
    ranks = TorchRanks(Path(launch.folder), 1, 2, CPU)
    loaded = load_all(launch.config, ranks)
    with ExitStack() as stack:
        for name, receive in zip(names, receivers, strict=True):
            follower = threading.Thread(
                target=follow, args=(loaded[name].execution.executor, receive)
            )
            follower.start()
            stack.callback(follower.join)
    assert finish() == End()
    ranks.close()


if __name__ == "__main__":
    main()
