"""Threads keep to their cores, and what a bound thread starts does not inherit its core."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading

import pytest

from pla_serve.cores import leave_bound_cores, on_any_core, on_the_same_cores
from pla_serve.engine.config import EngineConfig
from pla_serve.environment import usable_cores
from pla_serve.server.engine.process import ENVIRONMENT, PLACES, places

linux = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or usable_cores() < 2,
    reason="threads cannot be bound, or there is one core",
)

ENGINE = """
import json, os, subprocess, sys, threading
from pla_serve.cores import leave_bound_cores, on_any_core, on_the_same_cores
wide = threading.Event()
threading.Thread(target=wide.wait, daemon=True).start()
cores = sorted(os.sched_getaffinity(0))
with on_the_same_cores():
    import torch
imported = sorted(os.sched_getaffinity(0))
torch.set_num_threads(len(cores))
torch.zeros(2**20).add_(1)
leave_bound_cores()
main = sorted(os.sched_getaffinity(0))
others = [sorted(os.sched_getaffinity(int(id))) for id in os.listdir("/proc/self/task")
          if int(id) != os.getpid()]
child = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]
with on_any_core():
    free = int(subprocess.run(child, capture_output=True, check=True).stdout)
after = sorted(os.sched_getaffinity(0))
print(json.dumps([cores, imported, main, others, free, after]))
"""


@linux
def test_an_engine_keeps_its_compute_threads_apart() -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE],
        env={**variables, **ENVIRONMENT, **PLACES},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    cores, imported, main, others, free, after = json.loads(done.stdout)
    bound = [each for each in others if len(each) == 1]
    assert imported == cores
    assert len(bound) == len({tuple(each) for each in bound}) == len(cores) - 1
    assert main == after
    assert len(main) == 1
    assert main not in bound
    assert free == len(cores)


@linux
def test_nobody_moves_where_no_thread_is_bound() -> None:
    before = os.sched_getaffinity(0)
    leave_bound_cores()
    with on_the_same_cores(), on_any_core():
        pass
    assert os.sched_getaffinity(0) == before


@linux
def test_a_thread_that_is_bound_starts_others_that_are_not() -> None:
    seen = []

    def bound() -> None:
        os.sched_setaffinity(0, {min(all_cores)})
        with on_any_core():
            child = threading.Thread(target=lambda: seen.append(os.sched_getaffinity(0)))
            child.start()
            child.join()
        seen.append(os.sched_getaffinity(0))

    all_cores = os.sched_getaffinity(0)
    thread = threading.Thread(target=bound)
    thread.start()
    thread.join()
    assert seen == [all_cores, {min(all_cores)}]


@linux
def test_the_last_core_is_never_left() -> None:
    """Where every core is bound to somebody else, the thread stays where it is."""
    all_cores = os.sched_getaffinity(0)
    stop, started = threading.Event(), threading.Barrier(len(all_cores) + 1)

    def keep(core: int) -> None:
        os.sched_setaffinity(0, {core})
        started.wait()
        stop.wait()

    threads = [threading.Thread(target=keep, args=(core,)) for core in all_cores]
    for thread in threads:
        thread.start()
    started.wait()
    leave_bound_cores()
    assert os.sched_getaffinity(0) == all_cores
    stop.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({}, usable_cores() > 1),
        ({"threads": usable_cores()}, usable_cores() > 1),
        ({"threads": usable_cores() + 1}, False),
        ({"threads": max(1, usable_cores() - 1)}, False),
        ({"tensor_parallel_size": 2}, False),
        ({"device": "cuda:0"}, False),
    ],
)
def test_an_engine_is_bound_if_it_has_all_cores(settings: dict[str, object], bound: bool) -> None:
    config = EngineConfig(model="x", **settings)  # type: ignore[arg-type]
    assert places(config) == (PLACES if bound else {})
