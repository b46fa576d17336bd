"""Policies as text."""

from __future__ import annotations

import pytest

from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.declare import Kind, Registry
from pla_serve.policy.knobs import Knob
from pla_serve.policy.pools.registry import CONTROLLERS
from pla_serve.policy.registry import POLICIES, PolicySpec, parse_policy
from pla_serve.policy.routing.registry import ROUTINGS


def test_a_name_alone_leaves_the_settings_as_they_are() -> None:
    config = PolicyConfig(max_batch_tokens=77)
    spec = parse_policy("fcfs")
    assert spec == PolicySpec("fcfs")
    assert spec.configure(config) == config


def test_knobs_are_typed_and_go_before_the_settings() -> None:
    spec = parse_policy("srpt:max-batch-tokens=512:aging=0.5:boundary_tokens=none")
    assert spec.knobs == (("max_batch_tokens", 512), ("aging", 0.5), ("boundary_tokens", None))
    assert type(dict(spec.knobs)["max_batch_tokens"]) is int
    config = spec.configure(PolicyConfig(max_batch_tokens=9, boundary_tokens=3))
    assert (config.max_batch_tokens, config.boundary_tokens) == (512, None)
    assert parse_policy(str(spec)) == spec


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_made_with_its_defaults_named(name: str) -> None:
    """Each knob accepts its own default in words."""
    knobs = POLICIES[name].knobs
    spec = PolicySpec(name, tuple((knob, field.default) for knob, field in knobs.items()))
    assert parse_policy(str(spec)) == spec
    assert spec.create(PolicyConfig(), CostModel()).waits_as_short(1, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lifo", r"unknown policy 'lifo'; known are: length-aware, fcfs"),
        ("", r"unknown policy ''"),
        ("fcfs:aging=1", r"fcfs has no knob 'aging'; it has: max_batch_tokens, max_batch_req"),
        ("fcfs:max_batch_tokens", r"'max_batch_tokens' in policy .* is not of the form knob=value"),
        ("fcfs:max_batch_tokens=many", r"max_batch_tokens of policy fcfs is a whole number, not"),
        ("fcfs:max_batch_tokens=1.5", r"whole number, not '1.5'"),
        ("fcfs:max_batch_tokens=0", r"max_batch_tokens must be at least 1"),
        ("srpt:aging=x", r"aging of policy srpt is a number, not 'x'"),
        ("srpt:aging=nan", r"aging must be finite"),
        ("fcfs:max-batch-tokens=1:max_batch_tokens=2", r"max_batch_tokens is given twice"),
    ],
)
def test_what_is_wrong_is_said(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


@pytest.mark.parametrize("registry", [POLICIES, ROUTINGS, CONTROLLERS])
def test_every_knob_is_documented(registry: Registry[Kind[object]]) -> None:
    for kind in registry.values():
        assert kind.summary
        assert not kind.summary.endswith(".")
        assert f"{kind.name} ({kind.summary})" in registry.help()
        for field in kind.knobs.values():
            assert field.knob.help.endswith("."), f"{kind.name}: {field.name}"


def test_bounds_are_said_in_words() -> None:
    def words(kind: object, **bounds: float | bool) -> str:
        return Knob("", **bounds).range(kind)  # type: ignore[arg-type]

    assert words(int, least=1) == "be at least 1"
    assert words(float, least=0) == "be finite and at least 0"
    assert words(float | None, above=0) == "be positive and finite"
    assert words(float, above=0, finite=False) == "be positive"
    assert words(float, above=0, below=1) == "lie between 0 and 1"
    assert words(float, above=0, most=1) == "be positive and at most 1"
    assert words(float, least=0, below=1) == "be at least 0 and below 1"


def test_two_kinds_of_one_name_are_refused() -> None:
    module = "pla_serve.policy.baselines.fcfs"
    with pytest.raises(ValueError, match="two declarations of policy 'fcfs'"):
        Registry("policy", "POLICY", [module, module])


def test_an_alias_is_found_and_not_listed() -> None:
    assert CONTROLLERS["pla-serve"] is CONTROLLERS["pressure"]
    assert "pla-serve" not in list(CONTROLLERS)
