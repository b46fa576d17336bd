"""The autoscaling policy, with contexts such as Ray's controller makes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pla_serve.plugins.ray.scaling import DesiredReplicas


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def context(*replicas: dict[str, float], least: int = 1, most: int = 20) -> SimpleNamespace:
    names = ("short_rate", "long_rate", "short_backlog", "long_backlog", "kv_usage")
    metrics = {
        name: {n: float(replica.get(name, 0.0)) for n, replica in enumerate(replicas)}
        for name in names
    }
    return SimpleNamespace(
        aggregated_metrics=metrics,
        capacity_adjusted_min_replicas=least,
        capacity_adjusted_max_replicas=most,
        target_num_replicas=3,
    )


def test_the_number_follows_work_that_arrives_and_waits() -> None:
    policy = DesiredReplicas(Clock())
    assert policy(context({}))[0] == 1
    # 1.6 seconds of prefill a second at a utilisation of 0.8.
    assert policy(context({"short_rate": 0.4}, {"long_rate": 1.2}))[0] == 2
    # And 90 more that wait, to be done in 30 seconds.
    assert policy(context({"short_rate": 0.4, "long_backlog": 90}, {"long_rate": 1.2}))[0] == 5


def test_full_memory_counts_as_well() -> None:
    policy = DesiredReplicas(Clock())
    assert policy(context({"kv_usage": 0.9}, {"kv_usage": 0.9}, {"kv_usage": 0.9}))[0] == 4


def test_it_rises_at_once_and_falls_after_five_calm_minutes() -> None:
    clock = Clock()
    policy = DesiredReplicas(clock)
    assert policy(context({"short_rate": 4}))[0] == 5
    for clock.now in (1.0, 150.0, 299.0):
        assert policy(context({}))[0] == 5
    clock.now = 301.0
    assert policy(context({}))[0] == 1


def test_it_stays_within_rays_bounds() -> None:
    policy = DesiredReplicas(Clock())
    assert policy(context({"short_rate": 400}, most=7))[0] == 7
    assert DesiredReplicas(Clock())(context({}, least=2))[0] == 2


def test_replicas_that_say_nothing_stay_as_many_as_they_are() -> None:
    silent = context({})
    for silent.aggregated_metrics in (None, {}, {"other": {1: 2.0}}):
        assert DesiredReplicas(Clock())(silent)[0] == 3


def test_options_are_those_of_the_signal() -> None:
    assert DesiredReplicas(Clock(), horizon_seconds=10)(context({"long_backlog": 90}))[0] == 9
    with pytest.raises(ValueError, match="horizon_seconds"):
        DesiredReplicas(Clock(), horizon_seconds=0)
