"""`layertap explore` in a process of its own, asked as its page asks it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import struct
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

WAIT_S = 60.0


class Page:
    """The address that the command printed."""

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urllib.parse.urlsplit(url)
        self.host, self.path = parts.netloc, parts.path

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Returns the status, headers and body of an answer. A header is named with _ in place of -."""
        connection = http.client.HTTPConnection(self.host, timeout=WAIT_S)
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def post(self, view: str, body: bytes, **headers: str) -> tuple[int, list[tuple[dict[str, Any], dict[str, Any]]]]:
        """Returns the status and the messages of an answer."""
        headers.setdefault("Origin", f"http://{self.host}")
        status, _, data = self.request("POST", f"{self.path}api/{view}", body, **headers)
        return status, list(messages(data))

    def ask(self, view: str, **fields: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Returns the last message of an answer that is no error: its header and its arrays."""
        status, found = self.post(view, json.dumps(fields).encode())
        assert status == 200 and "error" not in found[-1][0], found[-1][0]
        return found[-1]

    def refusal(self, view: str, **fields: Any) -> dict[str, Any]:
        """Returns the error that an answer ends with."""
        _, found = self.post(view, json.dumps(fields).encode())
        error: dict[str, Any] = found[-1][0]["error"]
        return error


def messages(data: bytes) -> Iterator[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Yields the messages of an answer."""
    start = 0
    while start < len(data):
        header_size, size = struct.unpack_from("<II", data, start)
        header = json.loads(data[start + 8 : start + 8 + header_size])
        body = data[start + 8 + header_size : start + 8 + header_size + size]
        arrays = {}
        for one in header.pop("arrays"):
            dtype = {"float32": "<f4", "int32": "<i4"}[one["dtype"]]
            count = int(np.prod(one["shape"]))
            arrays[one["name"]] = np.frombuffer(body, dtype, count, one["offset"]).reshape(one["shape"])
        yield header, arrays
        start += 8 + header_size + size


@contextlib.contextmanager
def exploring(target: str, *flags: str, environment: Mapping[str, str] | None = None) -> Iterator[Page]:
    """Runs the command against a server, and checks that it says nothing but its address."""
    command = [sys.executable, "-m", "layertap", "explore", "--no-browser", "--target", target, *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **(environment or {})}, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            yield Page(process.stdout.readline().strip())
        finally:
            process.terminate()
            out, err = process.communicate(timeout=WAIT_S)
        assert not (out or err), out + err  # Not rewritten by pytest, so it says itself what came.
