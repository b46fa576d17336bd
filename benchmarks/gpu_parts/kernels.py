"""The device's ceilings, and attention alone."""

from __future__ import annotations

import torch

from gpu_parts.bed import BLOCK, MODELS
from gpu_parts.report import Report
from pla_serve.engine.attention.choose import ON_CUDA, _make, probe
from pla_serve.engine.attention.tuning import prefill_seconds
from pla_serve.engine.device.marks import CudaDevice, Device
from pla_serve.engine.kv.cache import KVShape


def median_seconds(device: Device, work, repeats: int = 10, warm: int = 3) -> float:  # type: ignore[no-untyped-def]
    """By the device's own clock where it has one."""
    import time
    from statistics import median

    for _ in range(warm):
        work()
    times = []
    for _ in range(repeats):
        device.record().wait()
        host = time.perf_counter()
        began = device.record()
        work()
        ended = device.record()
        ended.wait()
        times.append(ended.seconds_since(began) or time.perf_counter() - host)
    return median(times)


def ceilings(report: Report, device: Device, tiny: bool) -> dict[str, float]:
    """A large copy (bytes read and written) and a large matrix product, on random data."""
    kind = torch.float32 if device.torch_device.type == "cpu" else torch.bfloat16
    size = 512 if tiny else 8192
    left, right = (torch.randn(size, size, device=device.torch_device).to(kind) for _ in range(2))
    out = torch.empty_like(left)
    seconds = median_seconds(device, lambda: torch.mm(left, right, out=out))
    flops = 2 * size**3 / seconds
    count = (1 << 22) if tiny else 1 << 32
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device.torch_device)
    target = torch.empty_like(source)
    bandwidth = 2 * count / median_seconds(device, lambda: target.copy_(source))
    report.save("flops", flops)
    report.save("bytes_per_second", bandwidth)
    report.row("ceiling: matrix product", f"{flops / 1e12:.1f} TFLOP/s")
    report.row("ceiling: copy", f"{bandwidth / 1e12:.3f} TB/s")
    return {"flops": flops, "bytes_per_second": bandwidth}


def attention(report: Report, device: torch.device, flops: float, bandwidth: float) -> None:
    """Every backend against the reference, for each model's heads; then the kernel's speed."""
    for name, config in MODELS.items():
        if name == "tiny":
            continue
        heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
        shape = KVShape(1, kv, config["hidden_size"] // heads, torch.bfloat16)
        verdicts = {}
        for candidate in ON_CUDA:
            made = _make(candidate, device)
            verdict = made if isinstance(made, str) else probe(made, shape, heads, BLOCK, device)
            verdicts[candidate] = verdict or "right"
        report.save(f"{name} backends", verdicts)
        report.row(f"attention {name}", ", ".join(f"{k}: {v}" for k, v in verdicts.items()))
        report.check()
    _speed(report, device, flops, bandwidth)


def _speed(report: Report, device: torch.device, flops: float, bandwidth: float) -> None:
    from pla_serve.engine.attention.paged import MANY_ROWS_CHOICES, PagedAttention

    config = MODELS["Qwen2.5-7B"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    shape = KVShape(1, kv, 128, torch.bfloat16)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    for tokens, history in ((8192, 0), (8192, 24576)):
        pairs = tokens * history + tokens * (tokens + 1) / 2
        found = {}
        for tile in MANY_ROWS_CHOICES:
            report.check()
            name = f"{tile.rows}x{tile.keys} {tile.warps} warps {tile.stages} stages"
            try:
                seconds = prefill_seconds(
                    PagedAttention(processors, tile), shape, heads, BLOCK, device,
                    tokens=tokens, history=history,
                )  # fmt: skip
                found[name] = 4 * heads * 128 * pairs / seconds
            except Exception as error:  # does not fit the device
                found[name] = f"{type(error).__name__}: {str(error)[:80]}"
        report.save(f"prefill {tokens}+{history}", found)
        rates = {k: v for k, v in found.items() if isinstance(v, float)}
        if rates:
            best = max(rates, key=lambda name: rates[name])
            report.row(
                f"attention kernel, {tokens} on {history}",
                f"{rates[best] / 1e12:.0f} TFLOP/s = {rates[best] / flops:.2f} x product, {best}",
            )
    _torch_attention(report, device, heads, kv)
    _decode(report, device, shape, heads, processors, bandwidth)


def _torch_attention(report: Report, device: torch.device, heads: int, kv: int) -> None:
    """A yardstick: torch's own causal attention, contiguous and without history."""
    tracker = CudaDevice(device)
    query = torch.randn(1, heads, 8192, 128, dtype=torch.bfloat16, device=device)
    key, value = (
        torch.randn(1, kv, 8192, 128, dtype=torch.bfloat16, device=device) for _ in range(2)
    )

    def work() -> object:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )

    rate = 4 * heads * 128 * 8192 * 8193 / 2 / median_seconds(tracker, work)
    report.save("torch sdpa 8192+0", rate)
    report.row("torch's sdpa, 8192 on 0 (yardstick)", f"{rate / 1e12:.0f} TFLOP/s")


def _decode(
    report: Report,
    device: torch.device,
    shape: KVShape,
    heads: int,
    processors: int,
    bandwidth: float,
) -> None:
    from pla_serve.engine.attention.paged import PagedAttention
    from pla_serve.engine.batch.flat import SpanRequest
    from pla_serve.engine.batch.staging import PinnedUploader, stage
    from pla_serve.engine.kv.cache import KVCache

    tracker = CudaDevice(device)
    for count, context in ((1, 32768), (64, 4096)):
        report.check()
        blocks = context // BLOCK
        cache = KVCache(shape, count * context, device)
        for memory in (*cache.keys, *cache.values):
            memory.normal_()
        requests = [
            SpanRequest([0], context - 1, [(i * blocks, (i + 1) * blocks)], True)
            for i in range(count)
        ]
        batch = stage(requests, BLOCK, PinnedUploader(tracker))
        query = torch.randn(count, heads, 128, dtype=torch.bfloat16, device=device).transpose(0, 1)

        def work(query=query, cache=cache, batch=batch) -> object:  # type: ignore[no-untyped-def]
            return PagedAttention(processors).attend(0, query, cache, batch, 128**-0.5)

        seconds = median_seconds(tracker, work)
        rate = count * context * shape.heads * 128 * 2 * 2 / seconds
        report.save(f"decode {count}x{context}", {"seconds": seconds, "bytes_per_second": rate})
        report.row(
            f"decode attention, {count} of {context}",
            f"{seconds * 1e6:.0f} us, {rate / bandwidth:.2f} of the copy",
        )
