"""The environment of these tests has other packages than that of the server."""

from __future__ import annotations

import importlib.util

from layertap import Client


def test_the_client_of_layertap_works_without_what_the_server_is_made_of(client: Client) -> None:
    assert importlib.util.find_spec("transformers") is None
    assert client.embed("I love Paris").last_hidden_state.shape == (1, 5, 384)
