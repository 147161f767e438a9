"""The client needs nothing that the server is made of."""

from __future__ import annotations

import subprocess
import sys

from layertap import Client

WITHOUT_ENGINE = """
import sys

for name in ("torch", "transformers", "tokenizers", "safetensors"):
    sys.modules[name] = None  # Importing it raises ImportError.
from layertap import Client

with Client(sys.argv[1]) as client:
    print(client.embed("I love Paris").last_hidden_state.shape)
"""


def test_the_client_of_layertap_works_without_what_the_server_is_made_of(client: Client) -> None:
    command = [sys.executable, "-c", WITHOUT_ENGINE, client.target]
    assert subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout == "(1, 5, 384)\n"
