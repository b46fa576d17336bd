"""A Ray cluster of several nodes on this machine, an application on it, and load whose answers are
known. The head has the API; the nodes behind it have the instances, and can be killed."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster

STORE_BYTES = 80 << 20
"""Object store of a node; Ray takes no less than 75 MiB."""
READY_SECONDS = 120.0


class RayCluster:
    """Nodes of a cluster by number. Node 0 is the head and is never killed."""

    def __init__(self, nodes: int) -> None:
        self._cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 1,
                "resources": {"stays": 1},
                "object_store_memory": STORE_BYTES,
                "include_dashboard": False,
            },
        )
        ray.init(address=self._cluster.address, logging_level="ERROR", log_to_driver=False)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        serve.start("HeadOnly", http_options={"host": "127.0.0.1", "port": self.port})
        self._nodes = [self._add() for _ in range(nodes)]

    @property
    def nodes(self) -> int:
        """Number of nodes beside the head."""
        return len(self._nodes)

    def _add(self) -> Any:
        return self._cluster.add_node(
            num_cpus=1, resources={"goes": 1}, object_store_memory=STORE_BYTES
        )

    def kill(self, number: int) -> None:
        """Kill a node with everything on it, as a machine that loses its power, and add another."""
        self._cluster.remove_node(self._nodes[number], allow_graceful=False)
        self._nodes[number] = self._add()

    def replicas(self, deployment: str = "Instance") -> int:
        """Number of replicas of a deployment that run."""
        status = serve.status().applications["default"].deployments[deployment]
        return int(status.replica_states.get("RUNNING", 0))

    def wait_for(self, replicas: int) -> None:
        """Wait until so many instances run.

        Raises:
            TimeoutError: they do not.
        """
        until = time.monotonic() + READY_SECONDS
        while self.replicas() < replicas:
            if time.monotonic() > until:
                raise TimeoutError(
                    f"{self.replicas()} of {replicas} replicas run: {serve.status()}"
                )
            time.sleep(0.2)

    def close(self) -> None:
        serve.shutdown()
        ray.shutdown()
        self._cluster.shutdown()


@contextmanager
def ray_cluster(nodes: int) -> Iterator[RayCluster]:
    """A cluster of a head and so many nodes, which ends with the context."""
    cluster = RayCluster(nodes)
    try:
        yield cluster
    finally:
        cluster.close()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@dataclass
class Outcome:
    """What became of the requests of a load."""

    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    """Failures, and answers that differ from what they have to be."""
    longest_pause: float = 0.0
    """Seconds between two events of one stream."""


@dataclass(frozen=True)
class Load:
    """Clients that each send one request after another, as streams, until they are told to stop."""

    url: str
    model: str
    expected: Callable[[list[int], int], str]
    """Text of the answer to a prompt, of so many tokens."""
    clients: int = 4
    tokens: int = 40
    prompts: tuple[int, ...] = (5, 12, 40, 300)
    """Lengths."""
    pool: list[list[int]] | None = None
    """Prompts to choose from; None: random ones of those lengths."""

    async def run(self, stop: threading.Event, seed: int) -> Outcome:
        outcome = Outcome()
        async with httpx.AsyncClient(timeout=120.0) as http:
            clients = (self._client(http, stop, outcome, seed, n) for n in range(self.clients))
            await asyncio.gather(*clients)
        return outcome

    async def _client(
        self, http: httpx.AsyncClient, stop: threading.Event, outcome: Outcome, seed: int, n: int
    ) -> None:
        chance = random.Random(f"{seed}/{n}")
        while not stop.is_set():
            prompt = self._prompt(chance)
            try:
                text = await self._answer(http, prompt, outcome)
            except (httpx.HTTPError, KeyError, ValueError) as error:
                outcome.wrong.append(f"{type(error).__name__}: {error}")
                continue
            outcome.answered += 1
            if text != self.expected(prompt, self.tokens):
                outcome.wrong.append(f"{prompt[:5]}... of {len(prompt)}: {text[:80]}")

    def _prompt(self, chance: random.Random) -> list[int]:
        if self.pool is not None:
            return chance.choice(self.pool)
        return [chance.randrange(2, 250) for _ in range(chance.choice(self.prompts))]

    async def _answer(self, http: httpx.AsyncClient, prompt: list[int], outcome: Outcome) -> str:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": self.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        text, last = "", time.monotonic()
        async with http.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"{response.status_code}: {await response.aread()!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                now = time.monotonic()
                outcome.longest_pause = max(outcome.longest_pause, now - last)
                last = now
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(str(event["error"]))
                text += "".join(choice["text"] for choice in event["choices"])
        return text


def under_fire(
    cluster: RayCluster, load: Load, kills: int, seed: int, least: int, seconds: float = 1e9
) -> tuple[Outcome, int]:
    """Run a load while nodes are killed one after another, in an order of the seed.

    Args:
        kills: at most.
        least: instances that run before the next kill.
        seconds: no further kill after these.

    Returns:
        What became of the load, and the number of kills.
    """
    chance, stop, until = random.Random(seed), threading.Event(), time.monotonic() + seconds
    done = 0
    with ThreadPoolExecutor(1) as pool:  # Ray starts nodes on the main thread only
        running = pool.submit(lambda: asyncio.run(load.run(stop, seed)))
        try:
            while done < kills and time.monotonic() < until:
                time.sleep(chance.uniform(0.2, 1.0))
                cluster.kill(chance.randrange(cluster.nodes))
                done += 1
                cluster.wait_for(least)
        finally:
            stop.set()
        return running.result(), done


def echo(prompt: list[int], tokens: int) -> str:
    """What the fake engine answers."""
    return "".join(f" {prompt[n % len(prompt)]}" for n in range(tokens))
