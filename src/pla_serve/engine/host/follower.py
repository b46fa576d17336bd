"""The process of a rank other than 0: ``python -m pla_serve.engine.host.follower``.

It imports its libraries, which takes seconds, and then reads one line of JSON, a `FollowerLaunch`,
from its standard input. It ends when that input ends, because the pipe is closed when rank 0 ends,
in whatever way. SIGINT and SIGTERM are ignored, as rank 0 ignores them.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import IO

import msgspec

from pla_serve.engine.build.rank import build_rank
from pla_serve.engine.build.settings import build_settings, device_of_rank, use_threads
from pla_serve.engine.child import await_end_of_parent
from pla_serve.engine.loading import LoadingError, NoLoadingProgress, resolve
from pla_serve.engine.parallel.commands import CommandReceiver
from pla_serve.engine.parallel.following import follow
from pla_serve.engine.parallel.ranks import TorchRanks
from pla_serve.engine.parallel.team import FollowerLaunch, LastWords
from pla_serve.logs import configure

log = logging.getLogger(__name__)


def serve(launch: FollowerLaunch) -> None:
    """Load this rank's share of the model and obey rank 0 until it sends `End`."""
    config, folder = launch.config, Path(launch.folder)
    use_threads(config)
    receive = CommandReceiver(folder, launch.rank)
    device = device_of_rank(config, launch.rank)
    ranks = TorchRanks(folder, launch.rank, config.tensor_parallel_size, device)
    source = resolve(config.model, config.load_format, progress=NoLoadingProgress())
    built = build_rank(build_settings(config, source, device, time.monotonic, ranks))
    follow(built.execution.executor, receive)
    ranks.close()
    receive.close()


def watch_leader(folder: str) -> None:
    """Wait until rank 0 has ended, then end this process, whatever it is doing."""
    await_end_of_parent()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def run(words: IO[bytes]) -> int:
    """Read the launch, run the rank, and write the error to ``words`` if it fails.

    Returns:
        The exit status.
    """
    line = sys.stdin.buffer.readline()
    if not line:
        return 1  # rank 0 has ended
    launch = msgspec.json.decode(line, type=FollowerLaunch)
    configure(launch.log_level, launch.log_format, f"engine rank {launch.rank}")
    threading.Thread(
        target=watch_leader, args=(launch.folder,), name="leader-watch", daemon=True
    ).start()
    try:
        serve(launch)
    except Exception as error:
        expected = isinstance(error, (LoadingError, ValueError))
        log.log(logging.DEBUG if expected else logging.ERROR, "this rank failed", exc_info=True)
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        words.write(msgspec.json.encode(LastWords(error=text)) + b"\n")
        words.flush()
        return 1
    return 0


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with os.fdopen(os.dup(1), "wb") as words:
        os.dup2(2, 1)  # libraries print to standard output, which is for `LastWords` only
        return run(words)


if __name__ == "__main__":
    sys.exit(main())
