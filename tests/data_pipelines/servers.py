"""A real web server on this machine, whose files are broken, slow or in parts as a test asks."""

from __future__ import annotations

import contextlib
import http.server
import re
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; by the first part of its path, a request fails or waits.

    /flaky/NAME    500 twice, then the file
    /status/N/NAME always N
    /hang/NAME     headers, then nothing until the server ends
    /wait/NAME     nothing until `awaited` is set, then the file
    /whole/NAME    no parts of files
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ended, self.awaited, self.asked = folder, threading.Event(), threading.Event(), Counter[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: Any) -> None:
        pass  # a client that leaves early is no news


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        _, first, *rest = self.path.split("/")
        self.server.asked[self.path] += body
        if first == "status":
            return self.send_error(int(rest[0]))
        if first == "wait":
            self.server.awaited.wait()
        if first == "flaky" and self.server.asked[self.path] <= 2:
            return self.send_error(500)
        file = self.server.folder / self.path.strip("/").removeprefix(f"{first}/")
        if not file.is_file():
            return self.send_error(404)
        content, status = file.read_bytes(), 200
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part and first != "whole":
            start, end = int(part[1]), int(part[2] or len(content) - 1) + 1
            if start >= len(content):
                return self.send_error(416)
            content, status = content[start:end], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", self.date_time_string(int(file.stat().st_mtime)))
        self.end_headers()
        if first == "hang" and body:
            self.server.ended.wait()
        elif body:
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[Server]:
    with Server(folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.awaited.set()
            server.shutdown()
            thread.join()
