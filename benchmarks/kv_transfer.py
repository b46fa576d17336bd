"""What handing a request over from prefill to decode costs, between two engines on this machine.

Two engine processes of one thread each, as `pla-serve serve --kv-transfer` starts them, and
prompts that neither has seen. For each prompt length, medians of:

* prefill: from sending the request to its first token, on the first engine;
* hand-over: from the first token there to the second one here, less a decode step here. KV is read
  while it is computed, so this is what is left when the prefill is done;
* hand-over late: the same, but reading begins only after the prefill;
* early: share of the bytes read before the first engine had computed its last layer.

Then the time between the tokens of a stream on the second engine while the first one prefills long
prompts, with their KV read by the second engine and without; and the rate of reads alone.

    python benchmarks/kv_transfer.py --json result.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq
from rich.console import Console
from rich.table import Table

from pla_serve.engine.config import EngineConfig
from pla_serve.engine.host.process import CORE, Launch
from pla_serve.engine.transfer.layout import Copy
from pla_serve.engine.transfer.nixl import NixlTransport
from pla_serve.environment import describe
from pla_serve.wire.engine import (
    AbortRequest,
    AddRequest,
    Begin,
    EngineFailed,
    EngineReady,
    EngineStats,
    FromEngine,
    HandOver,
    Offer,
    Output,
    Release,
    Reserve,
    SamplingParams,
    ToEngine,
)
from pla_serve.wire.kv_offer import FLEET_SECRET_VARIABLE, bind

LEASE = 120.0
PATIENCE_SECONDS = 180.0
SECRET = secrets.token_hex(32)
RAW_BYTES = 256 * 2**20


class Engine:
    """An engine process, and the times at which its messages came."""

    def __init__(self, context: zmq.Context[Any], folder: str, name: str, config: EngineConfig):
        inbound, outbound = (f"ipc://{folder}/{name}-{way}" for way in ("in", "out"))
        self.out = context.socket(zmq.PULL)
        self.out.bind(outbound)
        self._in = context.socket(zmq.PUSH)
        self._in.connect(inbound)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pla_serve.engine.host.process", CORE],
            stdin=subprocess.PIPE,
            env={**os.environ, FLEET_SECRET_VARIABLE: SECRET},
        )
        self.reader = ""
        assert self._process.stdin is not None
        launch = Launch(config=config, inbound=inbound, outbound=outbound, log_level="WARNING")
        self._process.stdin.write(msgspec.json.encode(launch) + b"\n")
        self._process.stdin.flush()
        self._decode = msgspec.msgpack.Decoder(FromEngine).decode
        self.stats: EngineStats | None = None

    def send(self, message: ToEngine) -> None:
        self._in.send(msgspec.msgpack.encode(message))

    def hear(self, wanted: Callable[[FromEngine], bool]) -> tuple[float, FromEngine]:
        """The next such message, and when it came."""
        while self.out.poll(PATIENCE_SECONDS * 1000):
            message = self._decode(self.out.recv())
            now = time.monotonic()
            if isinstance(message, EngineFailed):
                raise SystemExit(message.error)
            if isinstance(message, EngineStats):
                self.stats = message
            if isinstance(message, EngineReady):
                self.reader = message.transfer_agent or ""
            if wanted(message):
                return now, message
        raise SystemExit("the engine says nothing")

    def token(self, request_id: str) -> tuple[float, Output]:
        when, message = self.hear(lambda m: isinstance(m, Output) and m.id == request_id)
        assert isinstance(message, Output)
        assert message.error is None, message.error
        return when, message

    def offer(self, request_id: str) -> bytes:
        _, message = self.hear(lambda m: isinstance(m, Offer) and m.id == request_id)
        assert isinstance(message, Offer)
        return message.source

    def moved(self) -> tuple[int, int]:
        """Bytes read so far, and those of them that were early; the engine must be at rest."""
        self.hear(lambda m: isinstance(m, EngineStats) and not m.load.running)
        assert self.stats is not None
        assert self.stats.transfer is not None
        return self.stats.transfer.bytes_read, self.stats.transfer.bytes_early

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._in.close(linger=0)
        self.out.close(linger=0)


class Bench:
    """Sends requests of random tokens."""

    def __init__(self, prefill: Engine, decode: Engine, vocabulary: int) -> None:
        self.prefill = prefill
        self.decode = decode
        self._vocabulary = vocabulary
        self._random = random.Random(0)
        self._ids = count()

    def request(self, length: int, tokens: int) -> AddRequest:
        return AddRequest(
            id=f"r{next(self._ids)}",
            prompt=[self._random.randrange(self._vocabulary) for _ in range(length)],
            sampling=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
            arrival=time.monotonic(),
        )

    def hand_over(self, length: int, late: bool) -> dict[str, float]:
        """One request of three tokens; seconds of its parts, and the early share."""
        plain = self.request(length, 3)
        began = time.monotonic()
        self.prefill.send(msgspec.structs.replace(plain, hand_over=HandOver(lease_seconds=LEASE)))
        source = self.prefill.offer(plain.id)
        source = bind(source, self.decode.reader)
        reserve = Reserve(request=plain, source=source, lease_seconds=LEASE)
        if not late:
            self.decode.send(reserve)
        first, output = self.prefill.token(plain.id)
        if late:
            self.decode.send(reserve)
        self.decode.send(Begin(id=plain.id, tokens=output.tokens))
        second, _ = self.decode.token(plain.id)
        third, _ = self.decode.token(plain.id)
        self.prefill.send(Release(plain.id))
        return {
            "prefill": first - began,
            "hand_over": (second - first) - (third - second),
            "step": third - second,
        }

    def lengths(self, length: int, repeats: int) -> dict[str, float]:
        found: dict[str, float] = {"tokens": length}
        for late in (False, True):
            before = self.decode.stats.transfer if self.decode.stats else None
            runs = [self.hand_over(length, late) for _ in range(repeats)]
            self.decode.moved()
            assert self.decode.stats is not None
            after = self.decode.stats.transfer
            assert after is not None
            name = "late" if late else "overlapped"
            found[f"hand_over_{name}_seconds"] = _median([run["hand_over"] for run in runs])
            if not late:
                read = after.bytes_read - (before.bytes_read if before else 0)
                early = after.bytes_early - (before.bytes_early if before else 0)
                found["prefill_seconds"] = _median([run["prefill"] for run in runs])
                found["decode_step_seconds"] = _median([run["step"] for run in runs])
                found["bytes"] = read / repeats
                found["early_share"] = early / read
        return found

    def stream(self, kind: str, tokens: int, length: int) -> dict[str, float]:
        """Seconds between tokens of a stream on the second engine; ``kind`` is what else runs."""
        stream = self.request(64, tokens)
        self.decode.send(stream)
        times = [self.decode.token(stream.id)[0]]
        poller = zmq.Poller()
        poller.register(self.decode.out, zmq.POLLIN)
        poller.register(self.prefill.out, zmq.POLLIN)
        running: AddRequest | None = None
        handed = 0
        while len(times) < tokens:
            if running is None and not kind.startswith("alone"):
                running = self.request(length, 3)
                lease = HandOver(lease_seconds=LEASE)
                self.prefill.send(msgspec.structs.replace(running, hand_over=lease))
            ready = dict(poller.poll(PATIENCE_SECONDS * 1000))
            if not ready:
                raise SystemExit("the engines say nothing")
            if self.prefill.out in ready:  # also old news, or the next poll would not wait
                _, message = self.prefill.hear(lambda _: True)
                if running is None or getattr(message, "id", None) != running.id:
                    pass
                elif isinstance(message, Offer) and kind == "read":
                    offer = bind(message.source, self.decode.reader)
                    reserve = Reserve(request=running, source=offer, lease_seconds=LEASE)
                    self.decode.send(reserve)
                elif isinstance(message, Output):
                    self.prefill.send(Release(running.id))
                    self.decode.send(AbortRequest(running.id))
                    running, handed = None, handed + 1
            if self.decode.out in ready:
                when, message = self.decode.hear(lambda _: True)
                if isinstance(message, Output) and message.id == stream.id:
                    times.append(when)
        if running is not None:
            self.prefill.send(AbortRequest(running.id))
            self.decode.send(AbortRequest(running.id))
        gaps = np.diff(times)
        return {
            "prompts_meanwhile": handed,
            **{f"p{q}_seconds": float(np.percentile(gaps, q)) for q in (50, 90, 99)},
        }


def rate(repeats: int) -> dict[str, float]:
    """GiB/s of reading another process's memory, in reads of the engine's size."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    owner = context.Process(target=_owner, args=(there,), daemon=True)
    owner.start()
    agent, metadata, address = here.recv()
    memory = np.zeros(RAW_BYTES, dtype=np.uint8)
    transport = NixlTransport("reader", [(memory.ctypes.data, RAW_BYTES)])
    piece = 4 * 2**20
    seconds: list[float] = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        for at in range(0, RAW_BYTES, piece):
            read = transport.read(
                agent, metadata, [Copy(memory.ctypes.data + at, address + at, piece)]
            )
            while not read.done():
                transport.progress()
        seconds.append(time.perf_counter() - began)
    assert memory.min() == 7
    owner.kill()
    owner.join()
    return {"bytes": RAW_BYTES, "gib_per_second": RAW_BYTES / 2**30 / _median(seconds[1:])}


def _owner(pipe: Connection) -> None:
    memory = np.full(RAW_BYTES, 7, dtype=np.uint8)
    transport = NixlTransport("owner", [(memory.ctypes.data, RAW_BYTES)])
    pipe.send((transport.name, transport.metadata, memory.ctypes.data))
    while True:
        transport.progress()
        time.sleep(0.005)


def _median(values: list[float]) -> float:
    return float(np.median(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=EngineConfig().model)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--stream-tokens", type=int, default=300)
    parser.add_argument("--kv-cache-gib", type=float, default=1.0, help="of each engine")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = EngineConfig(
        model=args.model,
        load_format=args.load_format,
        threads=1,
        kv_cache_gib=args.kv_cache_gib,
        kv_transfer=True,
    )
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        context = stack.enter_context(zmq.Context())
        engines = [
            stack.enter_context(closing(Engine(context, folder, name, config)))
            for name in ("prefill", "decode")
        ]
        ready = [engine.hear(lambda m: isinstance(m, EngineReady))[1] for engine in engines]
        assert isinstance(ready[0], EngineReady)
        bench = Bench(engines[0], engines[1], ready[0].vocab_size)
        bench.hand_over(64, late=False)  # connects
        engines[1].moved()
        rows = []
        for length in args.lengths:
            rows.append(bench.lengths(length, args.repeats))
            print(json.dumps(rows[-1]), flush=True)
        streams = {}
        for kind in ("alone", "computed", "read", "alone again"):
            streams[kind] = bench.stream(kind, args.stream_tokens, args.lengths[-1])
            print(kind, json.dumps(streams[kind]), flush=True)
    content = {
        "environment": describe(),
        "model": args.model,
        "threads_each": 1,
        "hand_overs": rows,
        "seconds_between_tokens": streams,
        "read": rate(args.repeats),
    }
    if args.json:
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    show(content)


def show(content: dict[str, Any]) -> None:
    console = Console()
    table = Table("tokens", "MiB", "prefill s", "hand-over ms", "late ms", "early", "step ms")
    for row in content["hand_overs"]:
        table.add_row(
            str(row["tokens"]),
            f"{row['bytes'] / 2**20:.1f}",
            f"{row['prefill_seconds']:.3f}",
            f"{1000 * row['hand_over_overlapped_seconds']:.1f}",
            f"{1000 * row['hand_over_late_seconds']:.1f}",
            f"{row['early_share']:.0%}",
            f"{1000 * row['decode_step_seconds']:.1f}",
        )
    console.print(table)
    table = Table("beside the stream", "prompts", "p50 ms", "p90 ms", "p99 ms")
    for kind, row in content["seconds_between_tokens"].items():
        times = [f"{1000 * row[f'p{q}_seconds']:.1f}" for q in (50, 90, 99)]
        table.add_row(kind, str(row["prompts_meanwhile"]), *times)
    console.print(table)
    console.print(f"reads: {content['read']['gib_per_second']:.2f} GiB/s")


if __name__ == "__main__":
    main()
