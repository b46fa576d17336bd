"""Operations: one declaration gives the route, its errors and its description."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.testclient import TestClient

from pla_serve.server.api.guard import Keys
from pla_serve.server.api.openapi import openapi, page
from pla_serve.server.api.routes import Api, Operation
from pla_serve.server.errors import invalid, json_response
from tests.server.server_harness import Live


class Body(BaseModel):
    text: str


async def echo(request: Request) -> Response:
    return json_response({"name": request.path_params["name"]})


async def refuse(request: Request) -> Response:
    raise invalid("no", "text")


async def crash(request: Request) -> Response:
    raise RuntimeError("a bug")


OPERATIONS = [
    Operation("GET", "/echo/{name:path}", echo, "Says the <name>."),
    Operation("POST", "/refuse", refuse, "Refuses.", body=Body, answers={"4XX": "Always."}),
    Operation("GET", "/crash", crash, "Fails."),
    Operation("GET", "/secret/{name}", echo, "Asks for a key.", keys=Keys(["k"])),
]


def test_errors_are_worded_as_openai_words_them() -> None:
    client = TestClient(Api(OPERATIONS))
    assert client.get("/echo/a/b").json() == {"name": "a/b"}
    assert client.post("/refuse").json()["error"]["param"] == "text"
    assert client.get("/crash").status_code == 500
    assert client.get("/nothing").json()["error"]["message"] == "Not Found"
    wrong = client.get("/refuse")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert "error" in wrong.json()


def test_an_operation_with_keys_asks_for_one_of_them() -> None:
    client = TestClient(Api(OPERATIONS))
    for header, code in ((None, 401), ("Bearer x", 401), ("Bearer \xff", 401), ("Bearer k", 200)):
        headers = {} if header is None else {b"authorization": header.encode("latin-1")}
        assert client.get("/secret/a", headers=headers).status_code == code


def test_a_response_writes_to_the_server_itself() -> None:
    """Each wrapper around ``send`` would run once for every token of a stream."""
    seen: list[Any] = []

    class Told(Response):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            seen.append(send)

    async def told(request: Request) -> Response:
        return Told()

    async def receive() -> Any:
        raise AssertionError("nobody reads")

    async def send(message: Any) -> None:
        raise AssertionError("nobody writes")

    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [], "query_string": b""}
    asyncio.run(Api([Operation("POST", "/x", told, "X.")])(scope, receive, send))
    assert seen == [send]


def test_description_follows_from_the_declaration() -> None:
    document = openapi(OPERATIONS)
    assert set(document["paths"]) == {"/echo/{name}", "/refuse", "/crash", "/secret/{name}"}
    refusal = document["paths"]["/refuse"]["post"]
    schema = refusal["requestBody"]["content"]["application/json"]["schema"]
    assert document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["required"] == [
        "text"
    ]
    assert refusal["responses"]["4XX"]["description"] == "Always."
    assert document["paths"]["/echo/{name}"]["get"]["parameters"][0]["name"] == "name"
    assert "Says the &lt;name&gt;." in page(OPERATIONS)


def test_the_page_for_people_needs_no_scripts(live: Live) -> None:
    answer = httpx.get(f"{live.url}/docs")
    assert answer.status_code == 200
    assert "/v1/chat/completions" in answer.text
    assert "<script" not in answer.text
