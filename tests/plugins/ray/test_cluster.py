"""The application on a cluster of three nodes, some of which are killed. Needs Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from tests.fleet.chaos.tiny_fleet import write_model

pytest.importorskip("ray.serve", reason="needs ray[serve] (make test-ray)")

from ray import serve
from ray.serve.config import RequestRouterConfig

from pla_serve.plugins.ray.application import AppArgs, build
from pla_serve.plugins.ray.replicas import unpack_stats
from tests.plugins.ray.cluster import Load, RayCluster, echo, ray_cluster, under_fire

ROOT = Path(__file__).parents[3]
NODES = 2
ROUTER = "pla_serve.plugins.ray.request_router.PredictedRequestRouter"
FAKE = "tests.server.fake_core:FakeCore"


class Model:
    """A deployment of somebody else."""

    async def chat(self, request: SimpleNamespace) -> str:
        assert request.messages
        return str(serve.get_replica_context().replica_id.unique_id)

    async def other(self, number: int) -> int:
        return number

    async def stream(self, request: SimpleNamespace) -> AsyncIterator[int]:
        for number in range(3):
            yield number


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster(NODES) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


def deploy(model: str, instances: int = NODES, most: int | None = None, short: int = 0) -> None:
    args = AppArgs(
        model=model,
        instances=instances,
        max_instances=most,
        short=short,
        resources={"goes": 1},
        api_cpus=0,
        api_resources={"stays": 0.1},
        serve="--load-format dummy",
    )
    path = f"{ROOT / 'src'}:{ROOT}"
    serve.run(build(args, FAKE, {"PYTHONPATH": path, "FAKE_PAUSE": "0.02"}))


@pytest.fixture(scope="module")
def application(cluster: RayCluster, model: str) -> RayCluster:
    deploy(model)
    return cluster


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"short": 2, "long": 1, "instances": 2}, "raise instances"),
        ({"short": 2, "instances": 2}, "lower short"),
        ({"instances": 3, "max_instances": 2}, "at least instances, 3"),
        ({"routing": "random"}, "random"),
        ({"serve": "--no-such-flag 3"}, "no-such-flag"),
        ({"serve": "--max-model-len many"}, "many"),
        ({"serve": "--port 9000"}, "no meaning on Ray"),
        ({"serve": "--batch-dir=/tmp"}, "no meaning on Ray"),
    ],
)
def test_arguments_are_checked_before_anything_starts(
    arguments: dict[str, object], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        build(AppArgs(model="m", **arguments))


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="replicas"):
        AppArgs(model="m", replicas=3)  # type: ignore[call-arg]


def test_keys_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLA_SERVE_API_KEY", "sk-one")
    options = build(AppArgs(model="m"))._bound_deployment.init_args[1]
    assert options.settings.api_keys == ("sk-one",)


def post(cluster: RayCluster, **body: object) -> httpx.Response:
    fields = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, **body}
    return httpx.post(f"{cluster.url}/v1/completions", json=fields, timeout=60)


def test_the_whole_api_is_there(application: RayCluster, model: str) -> None:
    answer = post(application, prompt=[5, 6, 7])
    assert answer.json()["choices"][0]["text"] == " 5 6 7 5 6 7"
    assert httpx.get(f"{application.url}/ready").status_code == 200
    names = httpx.get(f"{application.url}/v1/models").json()["data"]
    assert [name["id"] for name in names] == [model]
    assert "vllm:request_success_total" in httpx.get(f"{application.url}/metrics").text


def test_a_prompt_goes_where_its_beginning_is_cached(application: RayCluster) -> None:
    prompt = [9] * 64
    found = [
        post(application, prompt=prompt).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(4)
    ]
    assert found == [0, 63, 63, 63]


def test_refusals_of_all_replicas_reach_the_client(application: RayCluster) -> None:
    full = post(application, prompt=[5, 6, 7], seed=429)
    assert (full.status_code, full.headers["retry-after"]) == (429, "2")
    assert post(application, prompt=[5, 6, 7], seed=400).status_code == 400
    assert post(application, prompt=[5, 6, 7], seed=500).status_code >= 500


def test_no_stream_is_cut_when_nodes_are_killed(application: RayCluster, model: str) -> None:
    load = Load(application.url, model, echo)
    outcome, kills = under_fire(application, load, kills=2, seed=20, least=NODES)
    assert outcome.wrong == []
    assert kills == 2
    assert outcome.answered >= 4


def test_replicas_have_roles_by_their_rank(cluster: RayCluster, model: str) -> None:
    deploy(model, short=1)
    handle = serve.get_deployment_handle("Instance", "default")
    found: list[str] = []
    while len(set(found)) < NODES:
        stats = unpack_stats(handle.record_routing_stats.remote().result())
        assert stats is not None
        found.append(stats.report.role)
    assert set(found) == {"short", "mixed"}


def test_the_number_of_replicas_follows_the_work(cluster: RayCluster, model: str) -> None:
    serve.delete("default")
    deploy(model, instances=1, most=NODES)
    assert cluster.replicas() == 1
    with ThreadPoolExecutor(8) as pool:
        sent = [pool.submit(post, cluster, prompt=[n % 250] * 400) for n in range(60)]
        assert {answer.result().status_code for answer in sent} == {200}
    cluster.wait_for(2)


def test_the_router_alone_serves_deployments_of_others(cluster: RayCluster) -> None:
    """As in Ray Serve LLM: requests of OpenAI's form, and replicas that report nothing."""
    config = RequestRouterConfig(request_router_class=ROUTER)
    others = serve.deployment(Model).options(
        num_replicas=2, ray_actor_options={"num_cpus": 0}, request_router_config=config
    )
    handle = serve.run(others.bind(), name="others", route_prefix="/others")
    try:
        talk = [SimpleNamespace(role="user", content="hello " * 100)]
        request = SimpleNamespace(messages=talk)
        names = {handle.chat.remote(request).result() for _ in range(4)}
        assert len(names) == 1
        assert handle.other.remote(3).result() == 3
        stream = handle.options(stream=True).stream.remote(request)
        assert list(stream) == [0, 1, 2]
    finally:
        serve.delete("others")
