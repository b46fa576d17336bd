from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from pla_serve.policy.admission import LEAST_RETRY, Admission, Admit, Refuse
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel, CostProfile
from pla_serve.policy.protocol import PrefillPolicy, PrefillRequest, ServiceLevel
from pla_serve.policy.registry import POLICIES, create_policy


@dataclass
class Bench:
    """A policy with some work in it; a millisecond a token."""

    policy: PrefillPolicy
    cost: CostModel

    def decide(self, admission: Admission, tokens: int, **rest: float) -> Admit | Refuse:
        request = PrefillRequest("new", 0.0, tokens, **rest)  # type: ignore[arg-type]
        own = self.cost.prefill_seconds(tokens, 0, 512)
        return admission.decide(request, self.policy, own, 0.0)


def bench(name: str, *waiting: int) -> Bench:
    cost = CostModel(CostProfile(1e-3, 0, 0, 0, 0))
    policy = create_policy(name, PolicyConfig(), cost)
    for number, tokens in enumerate(waiting):
        policy.add(PrefillRequest(f"r{number}", 0.0, tokens), 0.0)
    return Bench(policy, cost)


@pytest.mark.parametrize("name", POLICIES)
def test_tokens_are_bounded_to_the_token(name: str) -> None:
    admission = Admission(max_queued_tokens=1000)
    full = bench(name, 200, 700)
    assert isinstance(full.decide(admission, 100), Admit)
    refusal = full.decide(admission, 101)
    assert isinstance(refusal, Refuse)
    assert "900 prompt tokens wait already; with 101 more" in refusal.reason
    assert refusal.retry_after_seconds == LEAST_RETRY


def test_retry_tells_when_enough_has_drained() -> None:
    refusal = bench("fcfs", 50_000).decide(Admission(max_queued_tokens=30_000), 5000)
    assert isinstance(refusal, Refuse)
    assert refusal.retry_after_seconds == pytest.approx(25.0)


@pytest.mark.parametrize("name", POLICIES)
def test_an_idle_machine_takes_any_prompt(name: str) -> None:
    admission = Admission(max_queued_tokens=10, max_predicted_wait=0.5)
    assert isinstance(bench(name).decide(admission, 1_000_000), Admit)


def test_wait_is_bounded_by_what_this_request_would_wait() -> None:
    """A short does not wait for longs under length-aware, so it is not refused for them."""
    admission = Admission(max_predicted_wait=20.0)
    assert isinstance(bench("length-aware", 50_000).decide(admission, 100), Admit)
    refusal = bench("fcfs", 50_000).decide(admission, 100)
    assert isinstance(refusal, Refuse)
    assert "exceeds the limit of 20 s" in refusal.reason
    assert refusal.retry_after_seconds == pytest.approx(30.0, rel=0.01)


def test_a_deadline_out_of_reach_is_told_but_not_refused() -> None:
    full = bench("length-aware")
    for name in "ab":
        full.policy.add(PrefillRequest(name, 0.0, 200, deadline=0.28), 0.0)
    for deadline, late in ((0.3, True), (0.6, False)):
        admit = full.decide(Admission(), 100, deadline=deadline)
        assert isinstance(admit, Admit)
        assert admit.late is late
        assert admit.forecast.predicted == admit.forecast.median == pytest.approx(0.5)


def taught(ratio: float, **bounds: float) -> Admission:
    """Learned from a hundred requests that first tokens take ``ratio`` times what is predicted."""
    admission = Admission(**bounds)  # type: ignore[arg-type]
    for number in range(100):
        forecast = admission.calibration.forecast(2.0 ** (number % 8 - 1), True, 0.0)
        admission.calibration.observe(forecast, forecast.predicted * ratio)
    return admission


def test_a_policy_that_predicts_too_much_does_not_refuse_too_much() -> None:
    """hrrn counts all 50 s that wait before a newcomer of 0.1 s, which soon passes most of it."""
    full = bench("hrrn", 50_000)
    assert isinstance(full.decide(Admission(max_predicted_wait=20.0), 100), Refuse)
    assert isinstance(full.decide(taught(0.3, max_predicted_wait=20.0), 100), Admit)


def test_a_machine_that_keeps_its_promises_late_is_not_believed() -> None:
    full = bench("fcfs", 15_000)
    assert isinstance(full.decide(Admission(max_predicted_wait=20.0), 100), Admit)
    refusal = full.decide(taught(2.0, max_predicted_wait=20.0), 100)
    assert isinstance(refusal, Refuse)
    assert "predicted wait of 30.0 s" in refusal.reason
    assert refusal.retry_after_seconds == pytest.approx(10.0)


@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0])
def test_whoever_comes_back_when_told_is_let_in(ratio: float) -> None:
    """Work falls by a second a second; what was told suffices, and nine tenths of it do not."""
    admission = taught(ratio, max_predicted_wait=4.0)
    refusal = bench("hrrn", 40_000).decide(admission, 100)
    assert isinstance(refusal, Refuse)
    for share, verdict in ((1.001, Admit), (0.9, Refuse)):
        left = 40_000 - round(1000 * share * refusal.retry_after_seconds)
        assert isinstance(bench("hrrn", left).decide(admission, 100), verdict)


def test_an_idle_machine_takes_any_prompt_whatever_it_has_learned() -> None:
    assert isinstance(bench("fcfs").decide(taught(50.0, max_predicted_wait=0.5), 100_000), Admit)


def test_late_means_a_chance_below_one_half() -> None:
    full, admission = bench("fcfs", 2000), Admission()
    for number in range(100):
        forecast = admission.calibration.forecast(2.1, True, 0.0)
        admission.calibration.observe(forecast, 2.1 * (1.0 if number % 5 < 3 else 3.0))
    verdicts = [full.decide(admission, 100, deadline=deadline) for deadline in (2.0, 2.2)]
    assert [v.late for v in verdicts if isinstance(v, Admit)] == [True, False]


@pytest.mark.parametrize("field", ["max_queued_tokens", "max_predicted_wait"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_bounds_must_be_positive(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        Admission(**{field: value})  # type: ignore[arg-type]


def test_one_tenants_backlog_refuses_nobody_else() -> None:
    """Neither by tokens nor by time; a second flood is refused beyond its part."""
    cost = CostModel()
    for admission in (Admission(max_queued_tokens=1000), Admission(max_predicted_wait=2.0)):
        policy = create_policy("fcfs", PolicyConfig(), cost)

        def ask(
            name: str, tenant: str, tokens: int = 100, parked: int = 0,
            *, policy: PrefillPolicy = policy, admission: Admission = admission,
        ) -> bool:  # fmt: skip
            request = PrefillRequest(name, 0.0, tokens, tenant=tenant)
            verdict = admission.decide(
                request, policy, cost.prefill_seconds(tokens, 0), 0.0, own_parked_tokens=parked
            )
            if isinstance(verdict, Admit):
                policy.add(request, 0.0)
            return isinstance(verdict, Admit)

        taken = sum(ask(f"a{number}", "a") for number in range(50))
        assert 5 <= taken <= 30
        assert ask("b", "b"), "it has nothing here yet"
        more = sum(ask(f"b{number}", "b") for number in range(50))
        assert 1 <= more < taken
        assert not ask("again", "a")
    assert not ask("parked", "c", parked=10**6) or admission.max_queued_tokens is None


class TestPromises:
    """Requests to which their targets were promised; half a second of others' work waits."""

    def full(self, due: float = 0.28) -> Bench:
        full = bench("length-aware")
        for name in "ab":
            full.policy.add(PrefillRequest(name, 0.0, 250, deadline=due), 0.0)
        return full

    def promised(self, full: Bench, tokens: int, **rest: float) -> Admit | Refuse:
        return full.decide(Admission(), tokens, service=ServiceLevel.PROMISED, **rest)  # type: ignore[arg-type]

    def test_a_first_token_that_would_come_too_late_is_refused(self) -> None:
        refusal = self.promised(self.full(), 100, deadline=0.5)
        assert isinstance(refusal, Refuse)
        assert "predicted after 0.60 s, and was promised within 0.50 s" in refusal.reason
        assert refusal.retry_after_seconds == LEAST_RETRY
        assert isinstance(self.promised(self.full(), 100, deadline=0.7), Admit)

    def test_work_that_gives_way_refuses_nobody(self) -> None:
        """It has later deadlines, or none, or is bulk."""
        full = bench("length-aware", 200, 250, 200)
        full.policy.add(PrefillRequest("bulk", 0.0, 200, service=ServiceLevel.BULK), 0.0)
        full.policy.add(PrefillRequest("later", 0.0, 200, deadline=3.0), 0.0)
        assert isinstance(self.promised(full, 100, deadline=0.3), Admit)

    def test_the_time_to_come_back_is_when_enough_is_done(self) -> None:
        full = bench("fcfs", 50_000)
        refusal = self.promised(full, 100, deadline=0.5)
        assert isinstance(refusal, Refuse)
        assert refusal.retry_after_seconds == pytest.approx(49.6, rel=0.01)

    def test_nine_in_ten_first_tokens_are_in_time(self) -> None:
        """Not half of them: what is believed is the upper end of what was seen."""
        admission = Admission()
        for number in range(200):
            forecast = admission.calibration.forecast(0.6, True, 0.0)
            admission.calibration.observe(forecast, 0.6 * (2.0 if number % 5 == 0 else 1.0))
        request = PrefillRequest("new", 0.0, 100, deadline=0.9, service=ServiceLevel.PROMISED)
        full = self.full()
        assert isinstance(admission.decide(request, full.policy, 0.1, 0.0), Refuse)
        wish = replace(request, service=ServiceLevel.USUAL)
        verdict = admission.decide(wish, full.policy, 0.1, 0.0)
        assert isinstance(verdict, Admit)
        assert not verdict.late

    def test_a_machine_with_nothing_to_do_takes_what_it_cannot_keep(self) -> None:
        verdict = self.promised(bench("length-aware"), 5000, deadline=0.3, tpot=1e-3)
        assert isinstance(verdict, Admit)

    @pytest.mark.parametrize("name", POLICIES)
    def test_tokens_that_would_come_too_slowly_are_refused(self, name: str) -> None:
        """Nine streams and one more, of a millisecond a token each."""
        full = bench(name)
        for number in range(9):
            full.policy.start_decode(f"s{number}", 10, 0.0, 0.0, tpot=0.02)
        refusal = self.promised(full, 10, deadline=5.0, tpot=0.0099)
        assert isinstance(refusal, Refuse)
        assert "a token every 10 ms is predicted" in refusal.reason
        assert isinstance(self.promised(full, 10, deadline=5.0, tpot=0.0101), Admit)

    def test_streams_that_give_way_count_as_far_as_places_are_shared(self) -> None:
        """Of 640 loose streams, 64 have places beside the one that is not."""
        full = bench("length-aware")
        for number in range(640):
            full.policy.start_decode(f"s{number}", 10, 0.0, 0.0, tpot=1.0)
        assert isinstance(self.promised(full, 10, deadline=5.0, tpot=0.065), Admit)
        refusal = self.promised(full, 10, deadline=5.0, tpot=1.0)
        assert isinstance(refusal, Admit)
        assert full.policy.token_seconds(10, 1.0, 0.0) == pytest.approx(64e-3 * 11)
        for number in range(600):
            full.policy.remove(f"s{number}")
        assert full.policy.token_seconds(10, 1.0, 0.0) == pytest.approx(41e-3)

    def test_bulk_work_is_refused_by_the_bounds_only(self) -> None:
        full = bench("length-aware", 200, 250, 9000)
        bulk = {"service": ServiceLevel.BULK, "deadline": 0.001, "tpot": 0.001}
        assert isinstance(full.decide(Admission(), 5000, **bulk), Admit)  # type: ignore[arg-type]
        bounded = Admission(max_queued_tokens=9500)
        assert isinstance(full.decide(bounded, 5000, **bulk), Refuse)  # type: ignore[arg-type]
