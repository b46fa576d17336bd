"""A process that answers /ready, writes a log, and misbehaves on demand.

    python fake_server.py DESCRIPTOR [fail-first FILE] [stubborn] [mute FILE] [gate FILE]
        [slow-drain]

``fail-first`` ends the first life with status 3, ``stubborn`` ignores SIGTERM,
``mute`` says that its engine is silent while there is such a file, ``gate`` waits for one before
it serves, and ``slow-drain`` takes longer to leave than a process may be silent.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        mute = "mute" in sys.argv and Path(sys.argv[sys.argv.index("mute") + 1]).exists()
        self.send_response(200)
        self.end_headers()
        if self.path == "/fleet/instance":
            self.wfile.write(b'{"engine_silent_seconds": %d}' % (3600 * mute))

    def log_message(self, *_: object) -> None:
        pass


def drain_slowly(server: HTTPServer) -> None:
    """Answer nobody for longer than the tests' supervisor waits for an answer, then leave."""
    server.socket.close()
    time.sleep(1.5)
    print("drained", flush=True)
    os._exit(0)


def main() -> None:
    print(f"life {os.getpid()}", flush=True)
    if "fail-first" in sys.argv:
        mark = Path(sys.argv[sys.argv.index("fail-first") + 1])
        if not mark.exists():
            mark.touch()
            print("this is why", file=sys.stderr, flush=True)
            sys.exit(3)
    while "gate" in sys.argv and not Path(sys.argv[sys.argv.index("gate") + 1]).exists():
        time.sleep(0.005)
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=int(sys.argv[1]))
    if "slow-drain" in sys.argv:
        signal.signal(signal.SIGTERM, lambda *_: drain_slowly(server))
    server.serve_forever()


main()
