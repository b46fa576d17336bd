"""A process that answers /ready, writes a log, and misbehaves on demand.

    python fake_server.py PORT [fail-first FILE] [stubborn] [mute FILE]

``fail-first`` ends the first life with status 3, ``stubborn`` ignores SIGTERM,
``mute`` says that its engine is silent while there is such a file.
"""

from __future__ import annotations

import os
import signal
import sys
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


def main() -> None:
    port = int(sys.argv[1])
    print(f"life {os.getpid()}", flush=True)
    if "fail-first" in sys.argv:
        mark = Path(sys.argv[sys.argv.index("fail-first") + 1])
        if not mark.exists():
            mark.touch()
            print("this is why", file=sys.stderr, flush=True)
            sys.exit(3)
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    HTTPServer(("127.0.0.1", port), Handler).serve_forever()


main()
