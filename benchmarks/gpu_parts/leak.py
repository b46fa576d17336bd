"""Whether memory grows while requests come, are aborted and go."""

from __future__ import annotations

import random
import resource
from pathlib import Path

import torch

from gpu_parts.bed import Bed
from gpu_parts.report import Report
from gpu_parts.serving import FULL, Job, Scale, Service
from pla_serve.policy.config import PolicyConfig


def leak(report: Report, bed: Bed, scale: Scale, seconds: float) -> None:
    """Mixed load with aborts; memory after a warm-up must not grow, the device's nor the host's."""
    rng = random.Random(7)
    service = Service(bed, "length-aware", PolicyConfig(max_batch_tokens=scale.batch))
    memory: list[dict[str, int]] = []
    live: list[str] = []
    sampled = 0.0

    def next_job(at: float) -> Job:
        prompt = rng.choice((20, 60, 200, 3000 if scale is FULL else 300))
        job = Job("mixed", prompt, rng.choice((1, 20)), at)
        live.append(job.id)
        return job

    def again(job: Job) -> None:
        nonlocal sampled
        service.add(next_job(service.now()))
        if rng.random() < 0.2 and live:
            service.abort(live.pop(rng.randrange(len(live))))
            service.add(next_job(service.now()))
        del live[:-50]
        if service.now() - sampled > seconds / 2000:
            sampled = service.now()
            memory.append(_memory(bed.device.torch_device))

    service.on_finish = again
    service.run([next_job(0.0) for _ in range(16)], min(seconds, report.left() - 2))
    service.drain()
    free = service.free_blocks()
    third = len(memory) // 3
    grown = {
        kind: max(sample[kind] for sample in memory[-third:])
        - max(sample[kind] for sample in memory[third : 2 * third])
        for kind in (memory[0] if third else ())
    }
    report.save(
        "memory",
        {
            "samples": len(memory), "grown_bytes": grown, "seconds": seconds,
            "blocks_free_at_the_end": free, "blocks": bed.blocks,
        },
    )  # fmt: skip
    most = max((n for kind, n in grown.items() if kind != "host"), default=grown.get("host", 0))
    shown = ", ".join(f"{kind} {n / 2**20:+.1f} MiB" for kind, n in grown.items())
    report.row(
        f"{bed.name}: {seconds:.0f} s of mixed load with aborts",
        f"peak of the last third over that of the second: {shown}; "
        f"{free} of {bed.blocks} blocks free at the end",
        "flat; ten minutes tell more",
        most <= 2**20 and free == bed.blocks if third else None,
    )


def _memory(device: torch.device) -> dict[str, int]:
    """Bytes: this process's, and the device's where it is another memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {"host": pages * resource.getpagesize()}
    if device.type == "cuda":
        found["allocated"] = torch.cuda.memory_allocated(device)
        found["reserved"] = torch.cuda.memory_reserved(device)
    return found
