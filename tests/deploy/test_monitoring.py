"""Dashboard and alerts name metrics that exist, and the alerts fire when they should.

Whether each query finds data is tried against a real Prometheus by ``benchmarks/monitoring.py``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from pla_serve.fleet.router.metrics import FleetMetrics
from pla_serve.fleet.status import ControlMetrics

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "deploy" / "grafana" / "pla-serve.json"
ALERTS = ROOT / "deploy" / "prometheus" / "alerts.yml"
NAME = re.compile(r"\b(?:vllm|pla_serve|pla_serve_router|pla_serve_fleet):[a-z0-9_]+")


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def known_metrics() -> set[str]:
    """All names that servers and routers may show, without the endings of samples."""
    metrics = FleetMetrics("m")
    ControlMetrics(metrics.registry, "m")
    text = metrics.render().decode()
    return {family.name for family in text_string_to_metric_families(text)}


def test_every_query_names_metrics_that_exist() -> None:
    known = known_metrics()
    queries = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    queries += [rule["expr"] for rule in rules()]
    assert len(queries) > 50
    for query in queries:
        names = NAME.findall(query)
        assert names or query.startswith("up{")
        for name in names:
            plain = re.sub(r"_(bucket|total|count|sum)$", "", name)
            assert plain in known, f"{name} in {query}"


def test_panels_lie_beside_each_other_and_say_what_they_show() -> None:
    placed = [(panel["title"], panel["gridPos"]) for panel in panels()]
    assert len({panel["id"] for panel in panels()}) == len(placed)
    assert all(panel["type"] == "row" or panel["description"] for panel in panels())
    for (one, a), (other, b) in combinations(placed, 2):
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        above = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or above, f"{one} lies over {other}"


def test_every_alert_says_what_happened_and_what_to_do() -> None:
    for rule in rules():
        assert {"summary", "action"} <= rule["annotations"].keys(), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (apt: prometheus)")
def test_alerts_fire_when_they_should() -> None:
    command = ["promtool", "test", "rules", str(Path(__file__).with_name("alerts_fire.yml"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
