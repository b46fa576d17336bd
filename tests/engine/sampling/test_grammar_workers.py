"""Grammars in worker processes: the same tokens, and nobody pays for somebody else's grammar."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from random import Random
from select import select as select_for_real
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from pla_serve.engine.sampling import Sampler, SequenceSampling
from pla_serve.engine.sampling import grammar_desks as desks_module
from pla_serve.engine.sampling import grammar_workers as module
from pla_serve.engine.sampling.grammar_workers import GrammarWorkers, WorkerFollower
from pla_serve.grammar.compiler import GrammarCompiler
from pla_serve.grammar.limits import GrammarLimits
from pla_serve.grammar.tokenizer import GrammarVocabulary
from pla_serve.grammar.watch import LOW_PRIORITY
from pla_serve.wire.engine import Grammar, SamplingParams
from tests.engine.local_grammars import LocalGrammars

EOS = 1
DEADLINE = 60.0
QUICK = GrammarLimits(compile_seconds=0.1, memory_bytes=2**30)
GRAMMARS = [
    Grammar("json_object"),
    Grammar("regex", "(ab|c){2,5}x?"),
    Grammar("lark", 'start: "(" start ")" | NUMBER\nNUMBER: /[0-9]{1,3}/'),
    Grammar("json_schema", '{"type": "array", "items": {"enum": ["a", 7]}, "maxItems": 3}'),
]
CRASHES = {
    "memory": Grammar("regex", "((a{1000}){1000}){1000}"),
    "stack": Grammar("lark", "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(6000))),
    "time": Grammar("json_schema", '{"type": "integer", "multipleOf": 10000019}'),
}
UNBOUNDED = GrammarLimits(definitions=10**6, compile_seconds=5.0)
"""Lets through what is refused for its form, so that the library's own crashes are met."""


@pytest.fixture(scope="module")
def make(vocabulary: GrammarVocabulary) -> Iterator[Callable[..., GrammarWorkers]]:
    made: list[GrammarWorkers] = []

    def start(limits: GrammarLimits | None = None, **options: Any) -> GrammarWorkers:
        made.append(GrammarWorkers(vocabulary, limits, **options))
        return made[-1]

    yield start
    for workers in made:
        workers.close()


@pytest.fixture(scope="module")
def workers(make: Callable[..., GrammarWorkers]) -> GrammarWorkers:
    return make()


def until(workers: GrammarWorkers, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        workers.poll()
        time.sleep(0.001)


def pid_of(sequence: SequenceSampling) -> int:
    """The worker that follows it."""
    follower = sequence.grammar
    assert isinstance(follower, WorkerFollower)
    assert follower.desk is not None
    assert follower.desk.worker.pid is not None
    return follower.desk.worker.pid


def begin(
    sampler: Sampler, grammar: Grammar | None, name: str = "r", tenant: str = ""
) -> SequenceSampling:
    params = SamplingParams(max_tokens=100, temperature=1.0, seed=3, grammar=grammar)
    return sampler.start(name, (), params, frozenset({EOS}), default_seed=0, tenant=tenant)


def follow(
    sampler: Sampler, sequences: Sequence[SequenceSampling], vocab: int, steps: int = 40
) -> list[list[int]]:
    """The tokens of each; whoever is late sits steps out, and meets the same logits later."""
    found: list[list[int]] = [[] for _ in sequences]
    live = set(range(len(sequences)))
    deadline = time.monotonic() + DEADLINE
    while live:
        assert time.monotonic() < deadline
        sampler.poll()
        rows = [row for row in sorted(live) if sequences[row].can_go_on]
        logits = torch.empty(len(rows), vocab)
        for place, row in enumerate(rows):
            generator = torch.Generator().manual_seed(1000 * row + len(found[row]))
            logits[place] = 2 * torch.randn(vocab, generator=generator)
            logits[place, EOS] += 3
        sampled = sampler.sample(logits, [sequences[row] for row in rows])
        for row, one in zip(rows, sampled, strict=True):
            assert one.error is None
            if one.late:
                continue
            if one.ended:
                live.discard(row)
                continue
            found[row].append(one.token)
            if one.stopped or one.grammar_finished or len(found[row]) == steps:
                live.discard(row)
    return found


def test_tokens_are_those_of_the_compiler_itself(
    workers: GrammarWorkers, compiler: GrammarCompiler, vocab_size: int
) -> None:
    device = torch.device("cpu")
    results = []
    for grammars in (LocalGrammars(compiler), workers):
        sampler = Sampler(vocab_size, device, grammars)
        sequences = [begin(sampler, grammar) for grammar in GRAMMARS * 3]
        results.append(follow(sampler, sequences, vocab_size))
        for sequence in sequences:
            sequence.close()
    assert results[0] == results[1]


@pytest.mark.parametrize("signalled", range(3))
def test_workers_that_are_killed_are_replaced_and_nobody_notices(
    workers: GrammarWorkers, compiler: GrammarCompiler, vocab_size: int, signalled: int
) -> None:
    device = torch.device("cpu")
    local = Sampler(vocab_size, device, LocalGrammars(compiler))
    expected = follow(local, [begin(local, grammar) for grammar in GRAMMARS], vocab_size)
    sampler = Sampler(vocab_size, device, workers)
    sequences = [begin(sampler, grammar) for grammar in GRAMMARS]
    until(workers, lambda: all(one.can_go_on for one in sequences))
    for desk in workers.desks:
        assert desk.worker.pid is not None
        with suppress(ProcessLookupError):  # one that was idle has been ended already
            os.kill(desk.worker.pid, signal.SIGKILL)
    assert follow(sampler, sequences, vocab_size) == expected
    for sequence in sequences:
        sequence.close()


def test_a_lost_nursery_is_replaced_and_nobody_notices(
    make: Callable[..., GrammarWorkers], compiler: GrammarCompiler, vocab_size: int
) -> None:
    workers = make()
    device = torch.device("cpu")
    local = Sampler(vocab_size, device, LocalGrammars(compiler))
    expected = follow(local, [begin(local, grammar) for grammar in GRAMMARS], vocab_size)
    sampler = Sampler(vocab_size, device, workers)
    sequences = [begin(sampler, grammar) for grammar in GRAMMARS]
    until(workers, lambda: all(one.can_go_on for one in sequences))
    os.kill(workers.nursery_pid, signal.SIGKILL)
    assert follow(sampler, sequences, vocab_size) == expected


@pytest.mark.parametrize(
    ("kind", "cause"),
    [("memory", "MiB of memory"), ("stack", "overflowed its stack"), ("time", "takes more than")],
)
def test_a_grammar_that_ends_its_worker_fails_alone_and_says_why(
    make: Callable[..., GrammarWorkers], vocab_size: int, kind: str, cause: str
) -> None:
    workers = make(QUICK if kind == "time" else UNBOUNDED)
    sampler = Sampler(vocab_size, torch.device("cpu"), workers)
    sane = begin(sampler, Grammar("regex", "[a-z]{40}"))
    until(workers, lambda: sane.can_go_on)
    hostile = begin(sampler, CRASHES[kind])
    assert follow(sampler, [sane], vocab_size)[0]
    until(workers, lambda: hostile.can_go_on)
    assert hostile.grammar_error is not None
    assert cause in hostile.grammar_error


def test_cohabitants_of_a_hostile_grammar_go_on(
    make: Callable[..., GrammarWorkers], vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker for all: it ends, again and again, and only its murderer fails."""
    monkeypatch.setattr(desks_module, "QUICK_WORKERS", 1)
    monkeypatch.setattr(desks_module, "SLOW_WORKERS", 1)
    workers = make(UNBOUNDED)
    sampler = Sampler(vocab_size, torch.device("cpu"), workers)
    sane = [begin(sampler, grammar, str(row)) for row, grammar in enumerate(GRAMMARS)]
    hostile = [begin(sampler, CRASHES[kind]) for kind in ("stack", "memory")]
    follow(sampler, sane, vocab_size)
    until(workers, lambda: all(one.can_go_on for one in hostile))
    assert all(one.grammar_error for one in hostile)
    assert not any(one.grammar_error for one in sane)


def test_costly_tokens_are_computed_by_slow_workers(
    make: Callable[..., GrammarWorkers], vocab_size: int
) -> None:
    """Each takes less than the limits, and many such workers took the engine's processors."""
    workers = make()
    sampler = Sampler(vocab_size, torch.device("cpu"), workers)
    sane = begin(sampler, Grammar("regex", "[a-z]{200}"), "sane")
    costly = begin(sampler, Grammar("regex", "(a{150}){150}"), "costly")
    follow(sampler, [sane, costly], vocab_size, steps=3 * desks_module.HEAVY_TOKENS)
    until(workers, lambda: sane.can_go_on and costly.can_go_on)
    assert os.getpriority(os.PRIO_PROCESS, pid_of(sane)) == os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, pid_of(costly)) == LOW_PRIORITY
    assert pid_of(costly) != pid_of(sane)
    costly_pid = pid_of(costly)
    costly.close()
    sane.close()
    until(workers, lambda: all(desk.worker.pid != costly_pid for desk in workers.desks))


class Waits:
    """Stands for `select` with a clock of its own, which moves only while somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0
        self.waited = 0.0
        self.standing = False
        """Whether nothing ever arrives."""

    def clock(self) -> float:
        return self.now

    def select(self, *arguments: Any) -> Any:
        if not self.standing:
            return select_for_real(*arguments)
        seconds = arguments[3]
        self.now += seconds
        self.waited += seconds
        return [], [], []


def test_late_masks_take_a_small_part_of_the_time(
    make: Callable[..., GrammarWorkers], vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two dozen texts whose masks never come, of one tenant, and one of another beside them."""
    waits = Waits()
    workers = make(clock=waits.clock)
    monkeypatch.setattr(module.select, "select", waits.select)
    sampler = Sampler(vocab_size, torch.device("cpu"), workers)
    plain = begin(sampler, None)
    hostile = [begin(sampler, Grammar("regex", "[ab]{50}"), f"h{i}", "h") for i in range(24)]
    until(workers, lambda: all(one.can_go_on for one in hostile))
    waits.standing = True
    logits = torch.zeros(25, vocab_size)
    steps, step_seconds = 500, 0.01
    longest = 0.0
    for step in range(steps):
        before = waits.waited
        rows = [plain, *(one for one in hostile if not one.lags)]
        if step % 7 == 0:  # they start anew, without a record of lateness
            for one in hostile:
                assert isinstance(one.grammar, WorkerFollower)
                one.grammar.late = 0
        results = sampler.sample(logits[: len(rows)], rows)
        assert not results[0].late
        longest = max(longest, waits.waited - before)
        waits.now += step_seconds
    assert longest <= module.PATIENCE_SECONDS + 1e-9
    elapsed = steps * step_seconds + waits.waited
    assert waits.waited <= module.WAIT_BURST_SECONDS + module.WAIT_SHARE * elapsed
    other = begin(sampler, Grammar("regex", "[ab]{50}"), "other", "quiet tenant")
    before = waits.waited
    assert sampler.sample(logits[:1], [other])[0].late
    assert waits.waited - before == pytest.approx(module.PATIENCE_SECONDS), "it has its own share"


def test_a_text_that_is_often_late_is_waited_for_no_more(
    make: Callable[..., GrammarWorkers], vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = Waits()
    workers = make(clock=waits.clock)
    monkeypatch.setattr(module.select, "select", waits.select)
    sampler = Sampler(vocab_size, torch.device("cpu"), workers)
    stuck = begin(sampler, Grammar("regex", "[ab]{50}"))
    until(workers, lambda: stuck.can_go_on)
    waits.standing = True
    logits = torch.zeros(2, vocab_size)
    assert not sampler.sample(logits[:1], [stuck])[0].late, "its mask was there"
    waited = []
    for _ in range(12):
        before = waits.waited
        assert sampler.sample(logits[:1], [stuck])[0].late
        waited.append(waits.waited > before)
        waits.now += 0.3  # less than the time after which a worker is given up
    assert waited == [True] * 3 + [False] * 9
    assert stuck.lags
    waits.standing = False
    until(workers, lambda: stuck.can_go_on)
    assert not stuck.lags
    assert not sampler.sample(logits[:1], [stuck])[0].late
    stuck.close()


def test_work_that_never_ends_is_ended(
    make: Callable[..., GrammarWorkers], vocab_size: int
) -> None:
    """A worker that stands still is taken to compute for ever."""
    workers = make(GrammarLimits(wall_seconds=0.2))
    sampler = Sampler(vocab_size, torch.device("cpu"), workers)
    first = begin(sampler, Grammar("regex", "[ab]{50}"))
    until(workers, lambda: first.can_go_on)
    os.kill(pid_of(first), signal.SIGSTOP)
    sampler.sample(torch.zeros(1, vocab_size), [first])
    until(workers, lambda: first.can_go_on)
    assert first.grammar_error is None  # nobody knows that it was its fault: it has another try


def test_tokens_that_were_made_elsewhere_are_followed(
    workers: GrammarWorkers, tokenizer: PreTrainedTokenizerFast, vocab_size: int
) -> None:
    sampler = Sampler(vocab_size, torch.device("cpu"), workers)
    params = SamplingParams(max_tokens=100, temperature=0.0, grammar=Grammar("regex", "abcd"))
    output = tokenizer.convert_tokens_to_ids(list("ab"))
    sequence = sampler.start("r", (), params, frozenset({EOS}), default_seed=0, output=output)
    [tokens] = follow(sampler, [sequence], vocab_size)
    assert tokenizer.decode(tokens) == "cd"
    wrong = tokenizer.convert_tokens_to_ids(list("az"))
    sequence = sampler.start("r", (), params, frozenset({EOS}), default_seed=0, output=wrong)
    until(workers, lambda: sequence.can_go_on)
    assert sequence.grammar_error is not None


def test_texts_that_end_leave_nothing_behind(
    make: Callable[..., GrammarWorkers], vocab_size: int
) -> None:
    workers = make()
    sampler = Sampler(vocab_size, torch.device("cpu"), workers)
    rng = Random(1)
    for text in range(60):
        sequence = begin(sampler, Grammar("regex", f"[ab]{{{text + 1}}}"))
        if rng.random() < 0.7:
            until(workers, lambda one=sequence: one.can_go_on)  # type: ignore[misc]
        if rng.random() < 0.5:
            follow(sampler, [sequence], vocab_size, steps=2)
        sequence.close()
        sequence.close()
    until(workers, lambda: all(desk.idle for desk in workers.desks))
    assert len(workers.desks) <= desks_module.QUICK_WORKERS


def test_costly_texts_are_gathered_in_few_slow_workers(
    make: Callable[..., GrammarWorkers], vocab_size: int
) -> None:
    """Two dozen that take long to compile, of two tenants; a third tenant's has a quick worker."""
    workers = make()
    sampler = Sampler(vocab_size, torch.device("cpu"), workers)
    hostile = [
        begin(sampler, Grammar("regex", f"(a{{{150 + i}}}){{{150}}}"), f"h{i}", "hi"[i % 2])
        for i in range(24)
    ]
    quick: list[bool] = []
    for turn in range(12):
        sane = begin(sampler, Grammar("regex", f"[a-y]{{{turn + 9}}}z"), f"s{turn}", "sane")
        until(workers, lambda one=sane: one.can_go_on)  # type: ignore[misc]
        assert follow(sampler, [sane], vocab_size, steps=5)[0]
        slow = [desk for desk in workers.desks if desk.slow and desk.usable]
        assert len(slow) <= desks_module.SLOW_WORKERS
        assert sum(not d.slow and d.usable for d in workers.desks) <= desks_module.QUICK_WORKERS
        assert isinstance(sane.grammar, WorkerFollower)
        desk = sane.grammar.desk
        assert desk is None or not desk.slow
        quick.append(desk is not None)
        sane.close()
    assert any(quick)
    assert any(one.grammar.costly for one in hostile if isinstance(one.grammar, WorkerFollower))
    for one in hostile:
        one.close()
    until(workers, lambda: all(desk.idle for desk in workers.desks))


def test_all_workers_together_have_bounded_memory(
    make: Callable[..., GrammarWorkers], vocab_size: int
) -> None:
    """The largest one is ended, its text fails alone, and the others go on."""
    limits = GrammarLimits(total_bytes=24 * 2**20, memory_bytes=2**30, compile_seconds=5.0)
    workers = make(limits)
    sampler = Sampler(vocab_size, torch.device("cpu"), workers)
    sane = begin(sampler, Grammar("regex", "[a-z]{40}"), "sane", "sane")
    until(workers, lambda: sane.can_go_on)
    hostile = begin(sampler, CRASHES["memory"], "h", "hostile")
    assert follow(sampler, [sane], vocab_size)[0]
    until(workers, lambda: hostile.can_go_on)
    assert hostile.grammar_error is not None
    assert "all grammars together need more than 24 MiB" in hostile.grammar_error
