"""The same vectors through the clients of other projects: texts a second, as a share of those of layertap.Client.embed.

Runs in the environment of `make test-compat`, which has the clients; the server runs in that of the checkout. Sides
alternate, round by round, so that a busy machine slows all of them; the share is the median of the rounds.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import openai
import tritonclient.grpc as triton
from texts import workload

from layertap import Client, Pooling
from layertap_server.testing import ServerProcess

ROOT = Path(__file__).resolve().parents[1]
TEXTS = 64
Embed = Callable[[list[str]], np.ndarray]


class Server(ServerProcess):
    """A server of the checkout's own environment."""

    def _start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        command = [str(ROOT / ".venv/bin/python"), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=os.environ | dict(environment), **pipes)


def sides(server: Server) -> dict[str, Embed]:
    """Returns what embeds a request's texts, by client; each takes the mean of the last layer, with length 1."""
    (line,) = [line for line in server.log.splitlines() if "listens for HTTP" in line]
    own = Client(server.address)
    model = own.model_info().model_id
    http = openai.OpenAI(base_url=line.rpartition("address=")[2] + "/v1", api_key="none")
    grpc = triton.InferenceServerClient(server.address)
    outputs = [triton.InferRequestedOutput("mean")]

    def layertap(texts: list[str]) -> np.ndarray:
        pooled = own.embed(texts, pooling=Pooling("mean", normalize=True), truncation="right", max_length=256).pooled
        return np.asarray(pooled)

    def base64(texts: list[str]) -> np.ndarray:
        answer = http.embeddings.create(model=model, input=texts)
        return np.array([item.embedding for item in answer.data], np.float32)

    def numbers(texts: list[str]) -> np.ndarray:
        answer = http.embeddings.create(model=model, input=texts, encoding_format="float")
        return np.array([item.embedding for item in answer.data], np.float32)

    def kserve(texts: list[str]) -> np.ndarray:
        given = triton.InferInput("text", [len(texts)], "BYTES")
        given.set_data_from_numpy(np.array(texts, object))
        parameters = {"normalize": True, "truncation": "right", "max_length": 256}
        return grpc.infer(model, [given], outputs=outputs, parameters=parameters).as_numpy("mean")

    return {"layertap": layertap, "tritonclient": kserve, "openai, base64": base64, "openai, float": numbers}


def rate(embed: Embed, requests: list[list[str]], callers: int) -> float:
    """Returns texts a second."""
    with concurrent.futures.ThreadPoolExecutor(callers) as pool:
        started = time.monotonic()
        list(pool.map(embed, requests))
        return TEXTS * len(requests) / (time.monotonic() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--requests", type=int, default=8, help="in each round, of 64 texts each")
    parser.add_argument("--callers", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--workloads", nargs="*", default=["short", "mixed"])
    options = parser.parse_args()
    server = Server("--kserve", "--http-port", "0")
    try:
        found = sides(server)
        for name in options.workloads:
            texts = workload(name, TEXTS * options.requests)[0]
            requests = [texts[first : first + TEXTS] for first in range(0, len(texts), TEXTS)]
            wanted = found["layertap"](requests[0])
            for side, embed in found.items():
                assert np.abs(embed(requests[0]) - wanted).max() < 1e-5, f"{side} gives other vectors"
            for callers in options.callers:
                rates: dict[str, list[float]] = {side: [] for side in found}
                for _ in range(options.rounds):
                    for side, embed in found.items():
                        rates[side].append(rate(embed, requests, callers))
                for side, values in rates.items():
                    shares = [one / own for one, own in zip(values, rates["layertap"], strict=True)]
                    print(
                        f"{name:6} {callers} callers  {side:15} {statistics.median(values):7.0f} texts/s  "
                        f"{statistics.median(shares):.2f} of layertap's",
                        flush=True,
                    )
    finally:
        server.stop()


if __name__ == "__main__":
    main()
