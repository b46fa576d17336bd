"""A small OpenAI server of its own process: ``python http_server.py --port N [serve's flags]``.

It answers after ``TTFT_MS`` (environment, a JSON object by policy) without any model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

CHUNK = '{"choices": [{"index": 0, "delta": {"content": "w "}, "text": "w "}]}'


class Server:
    def __init__(self, policy: str) -> None:
        delays = json.loads(os.environ.get("TTFT_MS", "{}"))
        self.seconds = delays.get(policy, 1) / 1000

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self.answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        path = head.split()[1]
        length = next(
            (
                int(line.split(":")[1])
                for line in head.split("\r\n")
                if "content-length" in line.lower()
            ),
            0,
        )
        body = json.loads(await reader.readexactly(length) or b"{}")
        if path == "/v1/models":
            content = b'{"data": [{"id": "fake"}]}'
        elif body:
            await asyncio.sleep(self.seconds)
            content = stream(body)
        else:
            content = b"{}"
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(content), content))
        await writer.drain()
        return True


def stream(body: dict) -> bytes:
    """All chunks at once."""
    words = sum(len(message["content"].split()) for message in body["messages"])
    usage = {
        "prompt_tokens": 2 * words + 9,
        "completion_tokens": body["max_tokens"],
        "prompt_tokens_details": {"cached_tokens": 9},
    }
    events = [CHUNK] * body["max_tokens"] + [json.dumps({"choices": [], "usage": usage}), "[DONE]"]
    return "".join(f"data: {event}\n\n" for event in events).encode()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--policy", default="fcfs")
    parser.add_argument("--fail", action="store_true")
    options, rest = parser.parse_known_args()
    if options.fail:
        sys.exit("cannot load the model: no such file")
    if log := os.environ.get("STARTS"):
        with Path(log).open("a") as file:
            print(options.policy, *rest, file=file)
    if file_name := os.environ.get("PID_FILE"):
        Path(file_name).write_text(str(os.getpid()))
    server = await asyncio.start_server(Server(options.policy).serve, "127.0.0.1", options.port)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
