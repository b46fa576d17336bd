"""The choice among replicas, without Ray, against the fleet's own parts."""

from __future__ import annotations

import random

import pytest

from pla_serve.fleet.router.prefixes import Chain
from pla_serve.plugins.ray.replicas import (
    Assumptions,
    Chosen,
    ReplicaChoice,
    ReplicaStats,
    RoutedPrompt,
    pack_stats,
    unpack_stats,
)
from pla_serve.policy.cost import CostProfile
from pla_serve.wire.link import InstanceFacts, InstanceReport, Role
from pla_serve.wire.statistics import EngineLoad

WALL = 1.8e9
COST = CostProfile(per_token=1e-3, per_attention=0, per_kv=0, per_sequence=0, per_launch=0)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def said(
    role: Role = "mixed", queued: float = 0.0, at: float = WALL, boot: str = "b", **more: bool
) -> ReplicaStats:
    facts = InstanceFacts(
        boot=boot,
        kind="pla",
        model="m",
        max_model_len=4096,
        vocab_size=300,
        kv_tokens=1 << 16,
        block_tokens=16,
        express=more.pop("express", False),
    )
    load = EngineLoad(boundary_tokens=256, cost=COST, queued_long_seconds=queued)
    state = {"ready": True, "draining": False, **more}
    return ReplicaStats(facts, InstanceReport(role=role, load=load, **state), at)  # type: ignore[arg-type]


def prompt(tokens: int, first: int = 0, *, told: bool = True) -> RoutedPrompt:
    return RoutedPrompt(tokens, Chain(range(first, first + tokens)), told=told)


def a_choice(*names: str, clock: Clock | None = None) -> ReplicaChoice:
    choice = ReplicaChoice(clock or Clock())
    choice.keep(names)
    return choice


def where(
    choice: ReplicaChoice, id: str, what: RoutedPrompt, names: str, leave_out: str = ""
) -> str:
    chosen = choice.choose(id, what, list(names), list(leave_out))
    assert chosen is not None
    return chosen.replica


def test_work_is_spread_by_predicted_seconds() -> None:
    choice = a_choice("a", "b")
    long = where(choice, "1", prompt(4000), "ab")
    other = ({"a", "b"} - {long}).pop()
    assert [where(choice, f"s{n}", prompt(100, n * 7919), "ab") for n in range(9)] == [other] * 9


def test_a_prompt_follows_its_beginning() -> None:
    choice = a_choice("a", "b", "c")
    first = where(choice, "1", prompt(640), "abc")
    choice.first_token("1", 0)
    choice.ended("1")
    assert {where(choice, f"{n}", prompt(700), "abc") for n in range(2, 5)} == {first}


def test_a_replica_that_restarted_has_forgotten_its_prefixes() -> None:
    clock = Clock()
    choice = a_choice("a", "b", clock=clock)
    clock.now += 2
    for name in "ab":
        choice.said(name, said(), WALL)
    first = where(choice, "1", prompt(640), "ab")
    choice.first_token("1", 0)
    choice.ended("1")
    full = choice.choose("2", prompt(640), "ab")
    choice.ended("2")
    choice.said(first, said(at=WALL + 1, boot="another"), WALL + 1)
    empty = choice.choose("3", prompt(640), "ab")
    assert full is not None
    assert empty is not None
    assert full.seconds < 0.1 < 0.6 < empty.seconds


def test_roles_make_class_pools() -> None:
    choice = a_choice("a", "b", "c")
    for name, role in zip("abc", ("short", "long", "long"), strict=True):
        choice.said(name, said(role), WALL)  # type: ignore[arg-type]
    longs = {where(choice, f"l{n}", prompt(3000, n * 7919), "abc") for n in range(4)}
    shorts = {where(choice, f"s{n}", prompt(50, n * 104729), "abc") for n in range(9)}
    assert (longs, shorts) == ({"b", "c"}, {"a"})


def test_reports_tell_of_work_that_other_routers_sent() -> None:
    choice = a_choice("a", "b")
    choice.said("a", said(queued=5.0), WALL)
    choice.said("b", said(), WALL)
    assert {where(choice, f"{n}", prompt(100, n * 7919), "ab") for n in range(4)} == {"b"}


def test_an_old_report_does_not_hide_what_was_sent_since() -> None:
    clock = Clock()
    choice = a_choice("a", "b", clock=clock)
    for name in "ab":
        choice.said(name, said(at=WALL), WALL)
    clock.now += 1.0
    busy = where(choice, "1", prompt(4000), "ab")
    clock.now += 1.0
    # Said half a second before the request was sent, and heard one second after it.
    choice.said(busy, said(at=WALL + 0.5), WALL + 2.0)
    assert where(choice, "2", prompt(100, 7919), "ab") != busy


def test_closed_and_failing_replicas_get_a_request_only_if_no_other_can() -> None:
    choice = a_choice("a", "b", "c")
    for name in "abc":
        choice.said(name, said(), WALL)
    choice.said("a", said(ready=False, at=WALL + 1), WALL + 1)
    assert where(choice, "1", prompt(9), "abc", "b") == "c"
    assert where(choice, "2", prompt(9), "ab", "b") == "b"
    assert where(choice, "3", prompt(9), "a", "a") == "a"


def test_only_candidates_are_chosen_and_unknown_ones_are_not() -> None:
    choice = a_choice("a", "b")
    assert {where(choice, f"{n}", prompt(9, n * 31), "b") for n in range(3)} == {"b"}
    assert choice.choose("x", prompt(9), ["unknown"]) is None


def test_first_tokens_that_nobody_tells_of_are_taken_to_come_as_predicted() -> None:
    clock = Clock()
    choice = ReplicaChoice(clock, assumed=Assumptions(tokens_per_second=1000))
    choice.keep("ab")
    busy = where(choice, "1", prompt(5000, told=False), "ab")
    assert {where(choice, f"{n}", prompt(50, n * 7919, told=False), "ab") for n in range(2, 9)} == {
        "ab".replace(busy, "")
    }
    clock.now += 6
    after = [where(choice, f"x{n}", prompt(50, n * 104729, told=False), "ab") for n in range(2)]
    assert set(after) == {"a", "b"}


def test_an_answer_that_came_sooner_than_predicted_leaves_its_prefix() -> None:
    choice = a_choice("a", "b")
    what = prompt(5000, told=False)
    first = where(choice, "1", what, "ab")
    choice.ended("1", first)
    assert {where(choice, f"{n}", what, "ab") for n in range(2, 4)} == {first}


def test_a_request_that_ray_sent_elsewhere_is_charged_there() -> None:
    choice = a_choice("a", "b")
    chosen = where(choice, "1", prompt(4000), "ab")
    other = "ab".replace(chosen, "")
    choice.sent("1", other, prompt(4000))
    assert where(choice, "2", prompt(50, 7919), "ab") == chosen
    choice.ended("1", chosen)  # late news of the first try
    assert choice.requests == 2
    choice.ended("1", other)
    choice.ended("2")
    assert choice.requests == 0


@pytest.mark.parametrize("seed", range(15))
def test_accounts_are_empty_after_any_history(seed: int) -> None:
    chance, clock = random.Random(seed), Clock()
    choice, alive, open_ids = ReplicaChoice(clock), {"r0", "r1", "r2"}, set[str]()
    choice.keep(alive)
    for step in range(400):
        clock.now += chance.expovariate(50)
        action, id = chance.random(), f"q{chance.randrange(60)}"
        what = prompt(chance.choice((1, 20, 700)), chance.randrange(40) * 100)
        if action < 0.5:
            got = choice.choose(id, what, alive, chance.sample(sorted(alive), 1))
            assert got is None or got.replica in alive
            open_ids.add(id)
        elif action < 0.6:
            choice.sent(id, chance.choice(sorted(alive)), what)
            open_ids.add(id)
        elif action < 0.8:
            choice.first_token(id, chance.choice((None, 0, 16)))
        elif action < 0.9:
            choice.ended(id)
        elif action < 0.95:
            name = chance.choice([*alive, "gone"])
            choice.said(name, said(queued=chance.random(), at=WALL + step), WALL + step)
        else:
            alive = {f"r{n}" for n in chance.sample(range(9), chance.randint(1, 4))}
            choice.keep(alive)
    for id in open_ids:
        choice.ended(id)
    assert choice.requests == 0
    assert not choice._router.view.waiting
    assert int(choice._router.view.requests.sum()) == 0
    choice.keep(set())
    assert len(choice._prefixes) == 0
    assert choice.choose("x", prompt(9), alive) is None


def test_statistics_of_other_kinds_are_ignored() -> None:
    stats = said()
    assert unpack_stats(pack_stats(stats)) == stats
    for other in (None, {}, {"pla_serve": b"\xc1"}, {"pla_serve": 3}, {"kv": b""}, []):
        assert unpack_stats(other) is None


def test_the_choice_says_what_it_expects() -> None:
    clock = Clock()
    choice = a_choice("a", clock=clock)
    clock.now += 2
    choice.said("a", said(), WALL)
    assert choice.choose("1", prompt(100), "a") == Chosen("a", pytest.approx(0.1), True)
    assert choice.choose("2", prompt(1000, 7919), "a") == Chosen("a", pytest.approx(1.0), False)


@pytest.mark.parametrize("field", [{"tokens_per_second": 0}, {"boundary_tokens": -1}])
def test_assumptions_are_checked(field: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        Assumptions(**field)
