"""What bertviz draws of attentions that the server computed is what the server computed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from bertviz import head_view, model_view

from layertap import Client

# bertviz leaves the file of its script to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
TEXT = "I love Paris in spring"


def _drawn(page: Any) -> dict[str, Any]:
    """Returns the data in a page, which its script begins with."""
    start = page.data.index('{"attention": ')
    found: dict[str, Any] = json.JSONDecoder().raw_decode(page.data[start:])[0]
    return found


@pytest.mark.parametrize("view", [head_view, model_view])
def test_a_view_has_every_probability_of_every_layer_and_head(client: Client, view: Any) -> None:
    embedding = client.embed(TEXT, attentions="all", return_tokens=True)
    tokens = embedding.tokens.tokens[0]
    page = view(embedding.to_torch().attentions, tokens, html_action="return")
    (drawn,) = _drawn(page)["attention"]
    assert drawn["left_text"] == drawn["right_text"] == tokens
    attentions = [embedding.attentions.ragged(layer)[0] for layer in embedding.attentions.layers]
    assert len(attentions) == 6 and np.array_equal(np.asarray(drawn["attn"], np.float32), attentions)


def test_a_view_of_a_pair_is_split_where_the_second_text_begins(client: Client) -> None:
    embedding = client.embed([(TEXT, "So do I")], attentions="all", return_tokens=True)
    tokens = embedding.tokens.tokens[0]
    start = tokens.index("[SEP]") + 1
    page = head_view(embedding.to_torch().attentions, tokens, start, html_action="return")
    across = next(one for one in _drawn(page)["attention"] if one["name"] == "Sentence B -> Sentence A")
    assert (across["left_text"], across["right_text"]) == (tokens[start:], tokens[:start])
    assert np.array_equal(
        np.asarray(across["attn"], np.float32)[2], embedding.attentions.ragged(2)[0][:, start:, :start]
    )
