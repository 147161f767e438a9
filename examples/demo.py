"""The main job, end to end: starts a server with the embedded model, uses it as anyone would, and stops it.

Run by `make demo`; needs no network and no GPU.
"""

from __future__ import annotations

import sys
import time

from layertap import Client, Pooling
from layertap_server.testing import running_server


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n{text}")


def main() -> None:
    started = time.monotonic()
    with running_server("--log-level", "warning") as server, Client(server.address) as client:
        info = client.model_info()
        devices, up_s = ", ".join(info.devices), time.monotonic() - started
        print(f"{info.model_id} on {devices} at {server.address}, up in {up_s:.1f} s")

        title("Tokens: client.tokenize('I love Paris', pad_to=7)")
        tokens = client.tokenize("I love Paris", pad_to=7)
        print("  tokens         ", *tokens.tokens[0])
        print("  attention_mask ", *tokens.attention_mask[0])
        print("  input_ids      ", *tokens.input_ids[0])

        title("Every layer: client.embed(tokens, layers='all', pooler_output=True)")
        embedding = client.embed(tokens, layers="all", pooler_output=True)
        print("  last_hidden_state ", embedding.last_hidden_state.shape)
        print("  pooler_output     ", embedding.pooler_output.shape)
        for layer in embedding.layers:
            print(f"  hidden_states[{layer}]  ", embedding.hidden_states[layer].shape)

        texts = ["Paris is the capital of France and its most visited city. " * (1 + n % 6) for n in range(64)]
        title(f"Layers as they are computed: client.embed_layers(...), {len(texts)} texts")
        began = time.monotonic()
        arrivals: dict[int, list[tuple[float, int]]] = {}
        for part in client.embed_layers(texts):
            arrivals.setdefault(part.layer, []).append(((time.monotonic() - began) * 1000, sum(map(len, part.rows))))
        for layer, parts in sorted(arrivals.items()):
            rows = sum(count for _, count in parts)
            print(f"  layer {layer}: first rows after {parts[0][0]:5.0f} ms, all {rows} after {parts[-1][0]:5.0f} ms")

        title("Meaning: client.embed(..., pooling=Pooling('mean', normalize=True))")
        texts = ["A man is playing the guitar.", "Someone plays a guitar.", "The recipe needs two eggs."]
        vectors = client.embed(texts, pooling=Pooling("mean", normalize=True)).pooled
        cosines = vectors @ vectors.T
        for first, second in ((0, 1), (0, 2), (1, 2)):
            print(f"  {cosines[first, second]:6.3f}  {texts[first]:29} {texts[second]}")
    print("\nThe server was stopped and ended with exit code 0.")


if __name__ == "__main__":
    main()
