"""Options are validated, and an unknown one is an error, never ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from pla_serve.plugins.vllm import LengthAwareScheduler
from pla_serve.plugins.vllm.options import PluginOptions, read_options
from pla_serve.plugins.vllm.versions import check_version, installed_version
from tests.plugins.vllm.harness import make_scheduler


def test_no_section_is_all_defaults() -> None:
    assert read_options({}) == PluginOptions()
    assert read_options({"gdn_prefill_backend": "auto"}) == PluginOptions()


def test_values_arrive() -> None:
    found = read_options({"pla_serve": {"long_share": 0.3, "boundary_tokens": 512, "patience": 0}})
    assert found == PluginOptions(long_share=0.3, boundary_tokens=512, patience=0)
    assert found.policy(100, 10).long_share == 0.3


@pytest.mark.parametrize(
    ("additional", "message"),
    [
        ({"pla_serve": {"log_share": 0.3}}, "no option 'log_share'; it has: boundary_tokens"),
        ({"long_share": 0.3}, "belongs into its section"),
        ({"pla-serve": {}}, "nobody reads 'pla-serve'"),
        ({"pla_serve": 3}, "must be an object"),
        ([], "must be a JSON object"),
        ({"pla_serve": {"long_share": 1.5}}, r"pla_serve.long_share must lie between 0 and 1"),
        ({"pla_serve": {"long_share": "half"}}, "must be a number, not 'half'"),
        ({"pla_serve": {"long_share": None}}, "must be a number, not None"),
        ({"pla_serve": {"long_share": True}}, "must be a number, not True"),
        ({"pla_serve": {"boundary_tokens": 2.5}}, "must be a whole number"),
        ({"pla_serve": {"boundary_tokens": -1}}, "boundary_tokens must be at least 0"),
        ({"pla_serve": {"step_seconds": 0}}, "step_seconds must be positive"),
        ({"pla_serve": {"step_seconds": float("nan")}}, "step_seconds must be positive"),
        ({"pla_serve": {"spare_share": 1.1}}, "spare_share must lie between 0 and 1"),
        ({"pla_serve": {"patience": float("inf")}}, "patience must be finite"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(additional: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options(additional)


def test_a_hardware_plugin_may_have_sections_of_its_own() -> None:
    assert read_options({"ascend": {"x": 1}}, foreign_keys=True) == PluginOptions()
    with pytest.raises(ValueError, match="belongs into its section"):
        read_options({"long_share": 0.5}, foreign_keys=True)


def test_the_scheduler_reads_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no option 'x'"):
        make_scheduler(LengthAwareScheduler, tmp_path, additional={"pla_serve": {"x": 1}})
    made = make_scheduler(
        LengthAwareScheduler, tmp_path, additional={"pla_serve": {"boundary_tokens": 77}}
    )
    assert made.planner.boundary() == 77


def test_what_it_cannot_do_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--no-enable-chunked-prefill"):
        make_scheduler(LengthAwareScheduler, tmp_path, chunked=False)


@pytest.mark.parametrize("found", ["0.31.4", "0.34.0", "1.32.0", "0.3", "0.320.1"])
def test_another_vllm_is_refused_with_what_to_install(found: str) -> None:
    with pytest.raises(
        ImportError, match=rf"made for vLLM 0\.32\.x or 0\.33\.x, and this is {found}"
    ):
        check_version(found)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1+cpu", "0.32.0rc1", "0.33.0"])
def test_these_series_are_taken(found: str) -> None:
    check_version(found)


def test_the_installed_one_is_found() -> None:
    assert installed_version() is not None
    check_version()
