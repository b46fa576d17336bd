"""Hand-overs between real processes over NIXL, also when one is stopped or killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from itertools import count

import msgspec
import pytest
import zmq

from pla_serve.engine.transfer.layout import KVSource
from pla_serve.wire.engine import Begin, Lend, Output, Rejected, Release, Reserve
from pla_serve.wire.kv_offer import SIGNATURE_BYTES, bind
from tests.engine.tiny import BLOCK, VOCABULARY, expected
from tests.engine.transfer.peer import Peer
from tests.engine.transfer.world import request

TOKENS = 8
LONG = 400
Launch = Callable[[], Peer]
_ids = count()


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Starts engines; they end with the module."""
    folder = tmp_path_factory.mktemp("peers")
    names = count()
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())

        def start() -> Peer:
            return stack.enter_context(closing(Peer(folder, str(next(names)), context)))

        yield start


@pytest.fixture(scope="module")
def pair(launch: Launch) -> tuple[Peer, Peer]:
    """One that prefills and one that decodes."""
    return launch(), launch()


def prompt_of(length: int, seed: int) -> tuple[int, ...]:
    return tuple((seed * 7919 + i * i * 31 + i) % (VOCABULARY - 1) + 1 for i in range(length))


def fresh() -> str:
    return f"r{next(_ids)}"


def start(p: Peer, d: Peer, name: str, prompt: tuple[int, ...], lease: float = 20.0) -> None:
    """Until the second engine reads what the first one computes."""
    p.send(request(name, prompt, lease=lease, max_tokens=TOKENS))
    source = p.offer(name).source
    add = request(name, prompt, max_tokens=TOKENS)
    d.send(Reserve(request=add, source=bind(source, d.name), lease_seconds=20.0))


def finish(p: Peer, d: Peer, name: str) -> tuple[int, ...]:
    """All tokens, after the first engine has made the first one."""
    first = p.tokens(name)
    d.send(Begin(id=name, tokens=list(first)))
    tokens = (*first, *d.tokens(name))
    p.send(Release(name))
    return tokens


def probe() -> object:
    return request(fresh(), (1, 2), max_tokens=1)


def test_tokens_are_those_of_one_engine(pair: tuple[Peer, Peer]) -> None:
    p, d = pair
    prompts = {fresh(): prompt_of(length, length) for length in (1, BLOCK, 90, 333, LONG)}
    for name, prompt in prompts.items():
        start(p, d, name, prompt)
    for name, prompt in prompts.items():
        assert finish(p, d, name) == expected("llama", prompt, TOKENS), name
    stats = d.stats(probe())
    assert (stats.taken_over, stats.recomputed) == (len(prompts), 0)
    assert p.stats(probe()).offers == 0


def test_chunks_move_while_later_ones_are_computed(pair: tuple[Peer, Peer]) -> None:
    """On a busy machine the reader may come late, but not to every prompt."""
    p, d = pair
    for seed in range(30, 60):
        prompt, name = prompt_of(LONG, seed), fresh()
        start(p, d, name, prompt)
        assert finish(p, d, name) == expected("llama", prompt, TOKENS), name
        if d.stats(probe()).bytes_early:
            return
    raise AssertionError("no KV was read before all of it was computed")


def test_a_cached_prefix_is_lent(pair: tuple[Peer, Peer]) -> None:
    p, d = pair
    prompt, name = prompt_of(200, 3), fresh()
    before = fresh()
    p.send(request(before, prompt, max_tokens=1))
    p.tokens(before)
    p.send(Lend(id=name, tokens=list(prompt), lease_seconds=20.0))
    offer = p.offer(name)
    assert offer.tokens == len(prompt)
    add = request(name, (*prompt, 5, 6), max_tokens=TOKENS)
    d.send(Reserve(request=add, source=bind(offer.source, d.name), lease_seconds=20.0))
    d.send(Begin(id=name, tokens=[]))
    assert d.tokens(name) == expected("llama", (*prompt, 5, 6), TOKENS)
    first = next(m for m in d.heard if isinstance(m, Output) and m.id == name)
    p.send(Release(name))
    assert d.stats(probe()).recomputed == 0
    assert first.tokens


def edited(offer: bytes) -> bytes:
    """Point an offer at the first blocks of the cache, and leave its signature as it is."""
    source = msgspec.msgpack.decode(offer[:-SIGNATURE_BYTES], type=KVSource)
    changed = msgspec.structs.replace(source, runs=[(0, source.runs[0][1])])
    return msgspec.msgpack.encode(changed) + offer[-SIGNATURE_BYTES:]


def test_hostile_offers_read_nothing_between_live_engines(pair: tuple[Peer, Peer]) -> None:
    """A copied, an edited, a cut and a foreign offer each fail their own request with the reason;
    no byte is read, and the offer itself still serves the request that it was made for."""
    p, d = pair
    victim, prompt, name = prompt_of(200, 11), prompt_of(200, 12), fresh()
    p.send(request(name, victim, lease=20.0, max_tokens=TOKENS))
    offer = p.offer(name).source
    first = p.tokens(name)
    before = d.stats(probe())
    hostile = {
        "copied": (prompt, bind(offer, d.name)),
        "edited": (victim, bind(edited(offer), d.name)),
        "cut": (victim, bind(offer, d.name)[:-7]),
        "of another reader": (victim, bind(offer, p.name)),
        "rubbish": (victim, b"\xff" * 300),
    }
    for kind, (tokens, source) in hostile.items():
        attack = fresh()
        add = request(attack, tokens, max_tokens=TOKENS)
        d.send(Reserve(request=add, source=source, lease_seconds=20.0))
        refusal = d.end(attack)
        assert isinstance(refusal, Rejected), kind
        assert refusal.reason, kind
    after = d.stats(probe())
    assert (after.bytes_read, after.taken_over) == (before.bytes_read, before.taken_over)
    add = request(name, victim, max_tokens=TOKENS)
    d.send(Reserve(request=add, source=bind(offer, d.name), lease_seconds=20.0))
    d.send(Begin(id=name, tokens=list(first)))
    assert (*first, *d.tokens(name)) == expected("llama", victim, TOKENS)
    p.send(Release(name))
    own = fresh()
    d.send(request(own, prompt, max_tokens=TOKENS))
    assert d.tokens(own) == expected("llama", prompt, TOKENS)


def test_a_stopped_prefill_delays_nothing_for_long(pair: tuple[Peer, Peer]) -> None:
    p, d = pair
    prompt, name = prompt_of(LONG, 5), fresh()
    start(p, d, name, prompt)
    p.signal(signal.SIGSTOP)
    d.send(Begin(id=name, tokens=[]))
    assert d.tokens(name) == expected("llama", prompt, TOKENS)
    p.signal(signal.SIGCONT)
    p.send(Release(name))
    again = fresh()
    start(p, d, again, prompt_of(90, 6))
    assert finish(p, d, again) == expected("llama", prompt_of(90, 6), TOKENS)


def test_a_stopped_decode_wakes_up_to_an_offer_that_is_gone(pair: tuple[Peer, Peer]) -> None:
    p, d = pair
    prompt, name = prompt_of(LONG, 8), fresh()
    d.signal(signal.SIGSTOP)
    start(p, d, name, prompt, lease=0.2)
    first = p.tokens(name)
    time.sleep(0.3)  # the lease is real time
    for seed in range(3):  # whatever was there is overwritten
        other = fresh()
        p.send(request(other, prompt_of(300, 20 + seed), max_tokens=1))
        p.tokens(other)
    assert p.stats(probe()).offers == 0
    d.signal(signal.SIGCONT)
    d.send(Begin(id=name, tokens=list(first)))
    assert (*first, *d.tokens(name)) == expected("llama", prompt, TOKENS)


def test_a_killed_prefill_is_replaced(pair: tuple[Peer, Peer], launch: Launch) -> None:
    p, d = pair
    prompt, name = prompt_of(LONG, 9), fresh()
    start(p, d, name, prompt)
    p.signal(signal.SIGKILL)
    d.send(Begin(id=name, tokens=[]))
    assert d.tokens(name) == expected("llama", prompt, TOKENS)
    new = launch()
    again = fresh()
    start(new, d, again, prompt_of(90, 10))
    assert finish(new, d, again) == expected("llama", prompt_of(90, 10), TOKENS)
    # Then the other side dies: what was kept for it is given back.
    last = fresh()
    start(new, d, last, prompt_of(90, 11), lease=0.1)
    d.signal(signal.SIGKILL)
    new.tokens(last)
    time.sleep(0.2)
    assert new.stats(probe()).offers == 0
