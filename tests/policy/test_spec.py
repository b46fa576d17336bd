"""Policies as text."""

from __future__ import annotations

from dataclasses import fields

import pytest

from pla_serve.policy.catalogue import POLICIES
from pla_serve.policy.config import PolicyConfig
from pla_serve.policy.cost import CostModel
from pla_serve.policy.spec import PolicySpec, knob_types, parse_policy


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
    kind = POLICIES[name]
    defaults = {f.name: getattr(PolicyConfig(), f.name) for f in fields(PolicyConfig)}
    if kind.options is not None:
        defaults |= {f.name: getattr(kind.options(), f.name) for f in fields(kind.options)}
    spec = PolicySpec(name, tuple((knob, defaults[knob]) for knob in knob_types(name)))
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
