"""A server process with the fake engine: prints its port and its engine's pid when it is ready.

Its arguments are the seconds of a drain and, for offline batches, their folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from pla_serve.engine.config import EngineConfig
from pla_serve.server.engine.client import EngineClient
from pla_serve.server.engine.process import EngineSpec
from pla_serve.server.model import ServedModel
from pla_serve.server.offline_options import OfflineOptions
from pla_serve.server.run import InstanceServer, listen, run
from pla_serve.server.settings import ServerSettings
from tests.server.server_harness import CONTEXT, ENGINE_PATH, MODEL, check_grammar, make_tokenizer


def main() -> int:
    listener = listen("127.0.0.1", 0)

    def on_ready(engine: EngineClient) -> None:
        print(listener.getsockname()[1], engine.pid, flush=True)

    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else None
    offline = OfflineOptions(folder, batch_free_mib=0) if folder else OfflineOptions()

    def instance() -> InstanceServer:
        return InstanceServer(
            ServerSettings((MODEL,), MODEL, drain_seconds=float(sys.argv[1]), offline=offline),
            EngineSpec(
                EngineConfig(max_model_len=CONTEXT),
                factory="tests.server.fake_core:FakeCore",
                env={"PYTHONPATH": ENGINE_PATH},
            ),
            ServedModel(make_tokenizer(), check_grammar),
            on_ready=on_ready,
        )

    return run(instance, listener)


if __name__ == "__main__":
    sys.exit(main())
