"""Rank 0 and the processes of the others: whoever ends, all end, and the reason is told."""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pla_serve.engine.config import EngineConfig
from pla_serve.engine.parallel.commands import UseIdleTime
from pla_serve.engine.parallel.team import PATROL_SECONDS, RankLost, Team

CONFIG = EngineConfig(tensor_parallel_size=2)
WAITS = "import sys; sys.stdin.read()"
"""Ends with its standard input."""
SPEAKS = """import sys; sys.stdin.readline(); print('{"error": "no memory left"}'); sys.exit(1)"""


def lost(team: Team) -> str:
    """Why the team says that it cannot go on."""
    with pytest.raises(RankLost) as caught:
        check_for_ever(team)
    return str(caught.value)


def check_for_ever(team: Team) -> None:
    with team.blamed():
        while True:
            team.check()


def test_last_words_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.CRITICAL):
        assert lost(Team(CONFIG, program=("-c", SPEAKS))) == "rank 1 of 2 ended: no memory left"


def test_a_kill_is_told() -> None:
    team = Team(CONFIG, program=("-c", WAITS))
    os.kill(team.pids[0], signal.SIGKILL)
    assert lost(team) == "rank 1 of 2 ended: killed by SIGKILL"
    assert not team.folder.exists()
    with pytest.raises(RankLost):
        team.send(UseIdleTime())


def test_a_failed_exchange_waits_for_its_reason() -> None:
    """The collective fails before the process that failed it has ended."""
    team = Team(CONFIG, program=("-c", WAITS))
    os.kill(team.pids[0], signal.SIGKILL)
    with pytest.raises(RankLost, match="killed by SIGKILL") as caught, team.blamed():
        raise RuntimeError("Connection closed by peer")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_own_failures_stay_what_they_are_and_end_the_others() -> None:
    team = Team(CONFIG, program=("-c", WAITS))
    with pytest.raises(ValueError, match="mine"), team.blamed():
        raise ValueError("mine")
    assert team._children[0].poll() == -signal.SIGKILL
    assert not team.folder.exists()


def test_who_waits_for_a_lost_rank_is_ended() -> None:
    reasons: queue.SimpleQueue[str] = queue.SimpleQueue()
    team = Team(CONFIG, program=("-c", SPEAKS), stuck=reasons.put, stuck_seconds=0.01)
    assert reasons.get(timeout=20) == "rank 1 of 2 ended: no memory left"
    team.close()


def test_an_idle_engine_looks_after_its_ranks() -> None:
    team = Team(CONFIG, program=("-c", WAITS))
    assert team.at_most(None) == team.at_most(7.0) == PATROL_SECONDS
    assert team.at_most(0.0) == 0.0
    team.close()


def test_followers_end_with_rank_0(tmp_path: Path) -> None:
    end = tmp_path / "end"
    follower = f"import sys; sys.stdin.read(); open({str(end)!r}, 'w')"
    code = (
        "import os, signal\n"
        "from pla_serve.engine.config import EngineConfig\n"
        "from pla_serve.engine.parallel.team import Team\n"
        f"Team(EngineConfig(tensor_parallel_size=2), program=('-c', {follower!r}))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) as leader:
        assert leader.stderr is not None
        leader.stderr.read()  # the follower holds it too
        assert leader.wait() == -signal.SIGKILL
    assert end.exists()
