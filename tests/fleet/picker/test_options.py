"""What is refused before a router with a picker starts."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from pla_serve.fleet.picker.options import PickerOptions
from pla_serve.fleet.route_command import RouteSettings
from tests.command_runner import pla_serve


def test_servers_of_other_kinds_cannot_be_picked() -> None:
    instances = ("http://10.0.0.1:8000", "vllm+http://10.0.0.2:8000")
    RouteSettings(instances=instances)
    pytest.importorskip("grpc")
    with pytest.raises(ValueError, match=r"instances of ours.*vllm\+http://10.0.0.2:8000"):
        RouteSettings(instances=instances, picker=PickerOptions(picker_port=9002))


def test_without_its_package_the_flag_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = importlib.util.find_spec

    def find(name: str, *more: Any) -> Any:
        return None if name == "grpc" else found(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    PickerOptions()
    with pytest.raises(ValueError, match=r"pip install 'pla-serve\[picker\]'"):
        PickerOptions(picker_port=0)


def test_a_port_out_of_range_is_refused() -> None:
    result = pla_serve("route", "m", "--instance", "http://h:1", "--picker-port", "65536")
    assert result.exit_code != 0
    assert "picker_port must lie in 0..65535" in result.stderr
