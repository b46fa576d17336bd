"""Steady mixed load, every answer of which is known beforehand."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

import httpx

from tests.fleet.chaos.tiny_fleet import VOCABULARY

TRIES = 20
"""Of one request, over router restarts."""
PAUSE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the tokens that one instance answers alone."""

    prompt: tuple[int, ...]
    max_tokens: int
    answer: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A request that was ended because instances ended with it."""

    id: str
    """Its name in the fleet's log."""
    began: float
    ended: float
    error: str


@dataclass(slots=True)
class Tally:
    """What became of the load."""

    answered: int = 0
    tokens: int = 0
    broken: int = 0
    """Connections that the death of the router cut; each was tried again."""
    refused: int = 0
    """429, or 503 while the router leaves, with Retry-After; each was tried again."""
    asked: int = 0
    """Requests so far, tries included; the number of each is its id in the fleet's log."""
    given_up: list[GivenUp] = field(default_factory=list)
    """Each is a problem unless it is by design: see `deaths`."""
    problems: list[str] = field(default_factory=list)
    """Failed, cut short, or wrong: each is a fault of the fleet."""
    first_seconds: list[float] = field(default_factory=list)


def make_questions(seed: int, count: int, longest: int = 1500) -> list[Question]:
    """Short prompts, long ones, and some that begin alike."""
    random = Random(seed)
    stems = [_tokens(random, 200) for _ in range(3)]
    questions = []
    for number in range(count):
        kind = number % 4
        if kind == 0:
            prompt = _tokens(random, random.randint(400, longest))
        elif kind == 1:
            prompt = random.choice(stems) + _tokens(random, random.randint(8, 60))
        else:
            prompt = _tokens(random, random.randint(4, 100))
        questions.append(Question(tuple(prompt), random.choice((8, 24, 60, 120))))
    return questions


def _tokens(random: Random, count: int) -> list[int]:
    return [random.randrange(1, VOCABULARY) for _ in range(count)]


async def learn(url: str, questions: list[Question]) -> list[Question]:
    """Asks one instance, one question at a time: what it says is right."""
    known = []
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        for question in questions:
            got = [token async for token in stream(client, question)]
            if len(got) != question.max_tokens:
                raise AssertionError(f"the oracle itself gave {len(got)} tokens")
            known.append(Question(question.prompt, question.max_tokens, tuple(got)))
    return known


class Refused(Exception):
    """Not now: 429, or 503 from a server that is leaving."""

    def __init__(self, seconds: float, *, draining: bool) -> None:
        super().__init__(f"refused for {seconds} s")
        self.seconds = seconds
        self.draining = draining


class Failed(Exception):
    """An error that the server told."""


async def stream(client: httpx.AsyncClient, question: Question, id: str = "question"):  # type: ignore[no-untyped-def]
    """Yields tokens as they come. ``id``: name of the request in the server's log.

    Raises:
        Refused, Failed: what the server said; httpx.HTTPError: what the network did.
    """
    body = {
        "prompt": list(question.prompt),
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    ended = False
    headers = {"X-Request-Id": id}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        if response.status_code in (429, 503) and "retry-after" in response.headers:
            seconds = float(response.headers["retry-after"])
            raise Refused(seconds, draining=response.status_code == 503)
        if response.status_code != 200:
            raise Failed(f"{response.status_code} {(await response.aread()).decode()[:200]}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    raise Failed(str(event["error"])[:200])
                for choice in event["choices"]:
                    for word in choice["text"].split():
                        yield int(word)
    if not ended:
        raise Failed("the stream stopped short, without an error")


class Load:
    """Clients that ask one question after another until `stop`.

    Args:
        excused: whether a connection that broke since this time may be the router's death.
    """

    def __init__(
        self,
        url: str,
        questions: list[Question],
        clients: int,
        seed: int,
        excused: Callable[[float], bool],
        pause_seconds: float = 0.0,
        tally: Tally | None = None,
    ) -> None:
        self.tally = tally or Tally()
        self._url = url
        self._questions = questions
        self._clients = clients
        self._seed = seed
        self._excused = excused
        self._pause = pause_seconds
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._client(Random(f"{self._seed}/{number}")))
            for number in range(self._clients)
        ]

    async def stop(self, seconds: float = 90.0) -> None:
        """Every request that was sent ends, or is a problem."""
        self._stopping = True
        _, late = await asyncio.wait(self._tasks, timeout=seconds)
        for task in late:
            self.tally.problems.append(f"a request had no end {seconds:.0f} s after the load")
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _client(self, random: Random) -> None:
        async with httpx.AsyncClient(
            base_url=self._url, timeout=httpx.Timeout(120, connect=30), trust_env=False
        ) as client:
            while not self._stopping:
                await ask(client, random.choice(self._questions), self.tally, self._excused)
                if self._pause:
                    await asyncio.sleep(random.expovariate(1 / self._pause))


async def ask(
    client: httpx.AsyncClient,
    question: Question,
    tally: Tally,
    excused: Callable[[float], bool],
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """One request to its end; again where the client was told, or the router died under it."""
    for _ in range(TRIES):
        began = clock()
        tally.asked += 1
        id = f"chaos-{tally.asked}"
        got: list[int] = []
        try:
            async for token in stream(client, question, id):
                if not got:
                    tally.first_seconds.append(clock() - began)
                got.append(token)
        except Refused as refused:
            if refused.draining and not excused(began):
                tally.problems.append("503, although the router stays")
            tally.refused += 1
            await asyncio.sleep(refused.seconds)
            continue
        except Failed as failed:
            if "instances ended with it" in str(failed):
                tally.given_up.append(GivenUp(id, began, clock(), str(failed)))
                return
            tally.problems.append(f"after {len(got)} of {question.max_tokens} tokens: {failed}")
            return
        except httpx.HTTPError as error:
            if _right(question, got, whole=False) and excused(began):
                tally.broken += 1
                await asyncio.sleep(PAUSE_SECONDS)
                continue
            tally.problems.append(f"after {len(got)} tokens: {type(error).__name__} {error}")
            return
        if not _right(question, got, whole=True):
            same = next(
                (i for i, (a, b) in enumerate(zip(got, question.answer, strict=False)) if a != b),
                None,
            )
            tally.problems.append(
                f"wrong tokens: {len(got)} of {len(question.answer)}, differ from {same}"
            )
        tally.answered += 1
        tally.tokens += len(got)
        return
    tally.problems.append(f"not answered in {TRIES} tries")


def _right(question: Question, got: list[int], *, whole: bool) -> bool:
    expected = question.answer if whole else question.answer[: len(got)]
    return tuple(got) == expected
