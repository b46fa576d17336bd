"""Whether processes hold on to memory for KV, or to file descriptors, once they are idle."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.fleet.chaos.tiny_fleet import METRICS_KEY, Process, TinyFleet

HELD = (
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "pla_serve:requests_parked",
    "pla_serve:waiting_tokens",
    "pla_serve:http_requests_in_flight",
)
"""All 0 in an idle process."""
SPARE_DESCRIPTORS = 4
"""A process may hold so many more than at first: a link that was cut and is there again, say."""


def metrics(url: str) -> dict[str, float]:
    """Sums over labels, by name."""
    headers = {"Authorization": f"Bearer {METRICS_KEY}"}
    answer = httpx.get(f"{url}/metrics", headers=headers, timeout=10, trust_env=False)
    text = answer.raise_for_status().text
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def count_descriptors(fleet: TinyFleet) -> dict[int, int]:
    """By process."""
    processes = fleet.processes()
    pids = [fleet.supervisor, *(pid for process in processes for pid in process.pids)]
    return {pid: descriptors(pid) for pid in pids}


def held(process: Process) -> dict[str, float]:
    """What an idle process still holds; empty if all is well."""
    values = metrics(process.url)
    return {name: values[name] for name in HELD if values.get(name)}


def find_leaks(
    fleet: TinyFleet, before: dict[int, int], count: int, seconds: float = 30.0
) -> list[str]:
    """What does not come to rest within a while.

    Args:
        before: descriptors of the fleet when it was idle for the first time. A process that was
            restarted is held against the most that any had then.
        count: instances.
    """
    end = time.monotonic() + seconds
    while True:
        problems = _problems(fleet, before, count)
        if not problems or time.monotonic() > end:
            return problems
        time.sleep(0.2)


def _problems(fleet: TinyFleet, before: dict[int, int], count: int) -> list[str]:
    processes = fleet.processes()
    if len(processes) != count + 1:
        return [f"{len(processes)} processes, not {count + 1}"]
    problems = [
        f"{process.role} on {process.port} holds {left}"
        for process in processes
        if (left := held(process))
    ]
    most = max(before.values())
    for pid, now in count_descriptors(fleet).items():
        allowed = before.get(pid, most) + SPARE_DESCRIPTORS
        if now > allowed:
            problems.append(f"process {pid} has {now} descriptors, {allowed} allowed")
    return problems
