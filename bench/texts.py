"""Workloads from text that ships with Python itself, the same on every machine with the same Python."""

from __future__ import annotations

import random
import re


def paragraphs() -> list[str]:
    """Returns the paragraphs of Python's own help topics, in a fixed random order."""
    from pydoc_data.topics import topics

    found = []
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(block.split())
            if len(text) >= 20 and any(letter.isalpha() for letter in text):
                found.append(text)
    random.Random(0).shuffle(found)
    return found


def workload(name: str, count: int) -> tuple[list[str], int]:
    """Returns texts and the max_length that every side cuts them to.

    Args:
        name: "mixed" (natural lengths), "uniform" (128 tokens each) or "short" (queries of 2 to 8 words).
        count: How many texts.
    """
    found = paragraphs()
    if name == "mixed":
        return [found[n % len(found)] for n in range(count)], 256
    words = " ".join(found).split()
    if name == "uniform":
        # 128 words are more than 128 tokens, so that cutting makes all texts equally long.
        starts = [n * 61 % (len(words) - 130) for n in range(count)]
        return [" ".join(words[start : start + 130]) for start in starts], 128
    chosen = random.Random(1)
    texts = []
    for n in range(count):
        start = (n * 11) % (len(words) - 10)
        texts.append(" ".join(words[start : start + chosen.randint(2, 8)]))
    return texts, 256
