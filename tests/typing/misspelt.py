"""What a user misspells, each an error for mypy: were one not, the ignore beside it would be unused, which is an error.

Never run. A misspelt value must not reach the server, and not even a run.
"""

from __future__ import annotations

from layertap import AsyncClient, Client, LayerMix, Pooling


def sync(client: Client) -> None:
    client.embed("x", dtype="float23")  # type: ignore[arg-type]
    client.embed("x", truncation="rigth")  # type: ignore[arg-type]
    client.embed("x", words="frist")  # type: ignore[arg-type]
    client.embed("x", layers="al")  # type: ignore[arg-type]
    client.embed("x", pooling="men")  # type: ignore[arg-type]
    client.embed("x", poling="mean")  # type: ignore[call-arg]
    client.embed("x", pooling=Pooling("men"))  # type: ignore[arg-type]
    client.embed("x", mix=LayerMix("men", layers=[0]))  # type: ignore[arg-type]
    client.embed_layers("x", dtype="float23")  # type: ignore[arg-type]
    client.embed_stream(["x"], on_error="rase")  # type: ignore[arg-type]
    client.embed_stream(["x"], dtype="float23")  # type: ignore[arg-type]
    client.tokenize("x", truncation="rigth")  # type: ignore[arg-type]
    client.encode("x", precision="int9")  # type: ignore[call-overload]
    client.encode("x", output_value="sentence")  # type: ignore[call-overload]


async def awaited(client: AsyncClient) -> None:
    await client.embed("x", dtype="float23")  # type: ignore[arg-type]
    await client.encode("x", precision="int9")  # type: ignore[call-overload]
    client.embed_layers("x", truncation="rigth")  # type: ignore[arg-type]
    client.embed_stream(["x"], on_error="rase")  # type: ignore[arg-type]
