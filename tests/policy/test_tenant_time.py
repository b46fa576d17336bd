"""One tenant floods the device; another one, with little work, is served nearly as if alone."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pla_serve.policy.book import RequestBook
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.length_aware import LengthAware
from pla_serve.policy.protocol import Batch, BatchClass, Chunk, Idle, PrefillRequest, Run, Wait
from pla_serve.policy.queues import DueQueue
from pla_serve.policy.tenant_time import MOST_PRESENT, PRESENT_SECONDS, TenantTime

PROFILE = CostProfile(7e-4, 0, 0, 1e-3, 1e-2)
"""About that of a 135M-parameter model on two cores: 100 steps a second of one stream alone."""
GPU = CostProfile(1e-5, 1e-9, 1e-9, 1e-4, 1e-2)
LAYERS = 12
CONFIG = PolicyConfig(layers=LAYERS)


def fixed_cost(profile: CostProfile) -> CostModel:
    cost = CostModel(profile)
    cost.observe = lambda batch, seconds: None  # type: ignore[method-assign]
    return cost


@dataclass
class Client:
    """Sends requests of one shape, so many at once, with a pause after each."""

    tenant: str
    prompt: int
    tokens: int
    at_once: int
    pause: float = 0.0
    first: list[float] = field(default_factory=list)
    """Times to first tokens."""
    gaps: list[float] = field(default_factory=list)
    """Times between tokens."""


@dataclass
class Sent:
    client: Client
    at: float
    left: int
    last: float | None = None


class Device:
    """Runs a policy's batches on virtual time, and asks it at layer boundaries of long ones."""

    def __init__(self, *clients: Client, profile: CostProfile = PROFILE) -> None:
        self.cost = fixed_cost(profile)
        self.policy = LengthAware(CONFIG, self.cost)
        self.now = 0.0
        self._ids = count()
        self._sent: dict[str, Sent] = {}
        self._due = [(0.01 * n, client) for client in clients for n in range(client.at_once)]

    def run(self, until: float) -> None:
        while self.now < until:
            self._arrivals()
            decision = self.policy.next(self.now)
            if isinstance(decision, Run):
                self._execute(decision.batch)
            elif isinstance(decision, Wait):
                self.now = decision.until
            else:
                assert isinstance(decision, Idle)
                self.now = max(self.now, min(at for at, _ in self._due))

    def _arrivals(self) -> None:
        ready = [client for at, client in self._due if at <= self.now]
        self._due = [(at, client) for at, client in self._due if at > self.now]
        for client in ready:
            name = f"{client.tenant}{next(self._ids)}"
            self._sent[name] = Sent(client, self.now, client.tokens)
            request = PrefillRequest(name, self.now, client.prompt, tenant=client.tenant)
            self.policy.add(request, self.now)

    def _execute(self, batch: Batch) -> None:
        seconds, pieces = self.cost.seconds(batch), 1
        if batch.kind is BatchClass.LONG and batch.prefills:
            pieces = LAYERS
        for piece in range(pieces):
            self.now += seconds / pieces
            self._arrivals()
            while piece < pieces - 1:
                inner = self.policy.at_layer_boundary(self.now, batch)
                if inner is None:
                    break
                self._execute(inner)
        self.policy.observe(batch, seconds, self.now)
        for chunk in batch.prefills:
            if chunk.completes:
                self._token(chunk)
        for chunk in batch.decodes:
            self._token(chunk)

    def _token(self, chunk: Chunk) -> None:
        sent = self._sent[chunk.request_id]
        client = sent.client
        if sent.last is None:
            client.first.append(self.now - sent.at)
        else:
            client.gaps.append(self.now - sent.last)
        began, sent.last, sent.left = sent.last is None, self.now, sent.left - 1
        if not sent.left:
            self.policy.remove(chunk.request_id)
            self._due.append((self.now + client.pause, client))
        elif began:
            self.policy.start_decode(
                chunk.request_id, client.prompt, sent.at, self.now, client.tenant
            )


def percentile(values: list[float], percent: int) -> float:
    return sorted(values)[len(values) * percent // 100]


def measured(*flood: Client) -> tuple[float, float, Client]:
    """TTFT P90 and ITL P99 of two clients that ask in turn, beside the flood of another tenant."""
    quiet = Client("a", 12, 24, at_once=2, pause=0.1)
    Device(*flood, quiet).run(15.0)
    return percentile(quiet.first, 90), percentile(quiet.gaps, 99), quiet


FLOODS = {
    "choices of one prompt": (Client("b", 30, 32, 1500),),
    "streams": (Client("b", 30, 64, 300),),
    "fewer streams than places": (Client("b", 30, 64, 62),),
    "short prompts": (Client("b", 200, 1, 50),),
    "the largest short prompts": (Client("b", 256, 1, 300),),
    "both": (Client("b", 256, 2, 100), Client("b", 5, 500, 100)),
    "several tenants": (Client("b", 30, 64, 80), Client("c", 200, 1, 40)),
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_a_flood_of_another_tenant_costs_at_most_its_share(flood: tuple[Client, ...]) -> None:
    first, gap, _ = measured()
    tenants = 1 + len({client.tenant for client in flood})
    flooded_first, flooded_gap, quiet = measured(*flood)
    assert flooded_first <= (tenants + 1.2) * first
    assert flooded_gap <= tenants * gap
    assert len(quiet.gaps) > 200
    assert all(client.gaps or client.first for client in flood)


def test_the_flood_gets_its_share_of_the_device() -> None:
    """With the tokens of both counted, half of the device does at least half of the work."""
    flood = Client("b", 30, 64, 62)
    Device(flood).run(10.0)
    alone = len(flood.gaps)
    flood = Client("b", 30, 64, 62)
    Device(flood, Client("a", 12, 24, 2, pause=0.1)).run(10.0)
    assert len(flood.gaps) >= 0.45 * alone


@pytest.mark.parametrize("profile", [PROFILE, GPU])
@pytest.mark.parametrize("tenants", [2, 5])
def test_tenants_with_equal_work_are_not_limited(profile: CostProfile, tenants: int) -> None:
    policy = LengthAware(CONFIG, fixed_cost(profile))
    each = 60 // tenants
    for tenant in range(tenants):
        for n in range(each):
            policy.start_decode(f"{tenant}/{n}", 500, 0.0, 0.0, str(tenant))
    decision = policy.next(1.0)
    assert isinstance(decision, Run)
    assert len(decision.batch.decodes) == each * tenants


def test_a_tenant_that_is_gone_counts_for_some_seconds() -> None:
    cost = fixed_cost(PROFILE)
    book = RequestBook(CONFIG, cost, DueQueue(), DueQueue())
    time = TenantTime(book)
    assert time.limit(0.0) is None
    book.start_decode("a", 100, 0.0, "a")
    assert time.limit(1.0) is None
    book.remove("a")
    for n in range(30):
        book.start_decode(f"b{n}", 100, 1.0, "b")
    limit = time.limit(1.0 + PRESENT_SECONDS)
    assert limit is not None
    assert limit.seconds == pytest.approx(2 * PROFILE.per_launch)
    assert time.limit(1.1 + PRESENT_SECONDS) is None


def test_tenants_that_are_gone_are_forgotten() -> None:
    book = RequestBook(CONFIG, fixed_cost(PROFILE), DueQueue(), DueQueue())
    time = TenantTime(book)
    for n in range(3 * MOST_PRESENT):
        book.start_decode("x", 1, 0.0, f"tenant {n}")
        time.limit(1.0)
        book.remove("x")
    assert len(time._seen) <= MOST_PRESENT + 1


@given(
    seed=st.integers(0, 10**6), profile=st.sampled_from([PROFILE, GPU, CostProfile(0, 0, 0, 0, 1)])
)
@settings(max_examples=25, deadline=None)
def test_everybody_gets_tokens_under_any_mix(seed: int, profile: CostProfile) -> None:
    """No stream waits for more than a turn of all others, in batches that are limited."""
    rng = Random(seed)
    tenants = "abcde"[: rng.randint(2, 5)]
    clients = [
        Client(
            rng.choice(tenants),
            rng.choice((1, 20, 250)),
            rng.choice((1, 3, 40)),
            rng.choice((1, 3, 30)),
            rng.choice((0.0, 0.2)),
        )
        for _ in range(rng.randint(2, 6))
    ]
    device = Device(*clients, profile=profile)
    device.run(rng.uniform(3, 6))
    waits: defaultdict[str, float] = defaultdict(float)
    for sent in device._sent.values():
        if sent.left:
            waits[sent.client.tenant] = max(
                waits[sent.client.tenant], device.now - (sent.last or sent.at)
            )
    work = sum(client.at_once * (client.prompt + 2) for client in clients)
    turn = sum(client.at_once for client in clients) * (profile.per_launch + 2e-3)
    bound = 2 * len(tenants) * (turn + work * profile.per_token + 1.0)
    assert all(wait <= bound for wait in waits.values()), (dict(waits), bound)


UNITS = st.sampled_from([0.0, 1e-7, 1e-4])


@given(
    profile=st.builds(CostProfile, UNITS, UNITS, UNITS, UNITS, st.sampled_from([1e-4, 1e-2])),
    flood=st.sampled_from(list(FLOODS.values())),
)
@example(CostProfile(0, 1e-4, 0, 0, 1e-2), FLOODS["short prompts"])
@settings(max_examples=30, deadline=None)
def test_whatever_a_fit_says_costs_nothing(profile: CostProfile, flood: tuple[Client, ...]) -> None:
    """Any unit of work may cost nothing. Decisions are made all the same, and both get tokens."""
    device = Device(*flood, quiet := Client("a", 12, 4, 1), profile=profile)
    for _ in range(500):
        device.run(device.now + 1e-9)  # one batch
    assert quiet.first
    assert all(client.first for client in flood)


def test_no_tenant_gets_more_than_its_part_of_the_prefill_tokens() -> None:
    """Prefills that are passed over keep their place."""
    queue = DueQueue()
    book = RequestBook(CONFIG, fixed_cost(PROFILE), queue, DueQueue())
    for n, (tenant, tokens) in enumerate([("b", 50), ("b", 40), ("b", 3), ("a", 30)]):
        book._queues[True].push(book._make(PrefillRequest(str(n), n, tokens, tenant=tenant), n))
    taken = book.take(queue, 10, 200, 1.0, each=60)
    assert [(chunk.request_id, chunk.tokens) for chunk in taken.chunks] == [
        ("0", 50),
        ("1", 10),
        ("3", 30),
    ]
    assert [pending.id for pending in queue.drain(2.0)] == ["2"]
