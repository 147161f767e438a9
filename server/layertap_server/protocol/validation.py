"""Texts of a request, checked against the model and the limits and turned into the server's own types.

A fault is refused by its field or item, the limit and the next step, never by the text itself. Rules:
- The length of a list is checked before an object is made of it.
- `items` checks what a caller sent, `check_tokenized` what the tokenizer made of it; options are
  checked in `options`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Final

from layertap.errors import InvalidArgumentError, LayertapError
from layertap.types import Limits
from layertap.v1 import embedding_pb2 as pb
from layertap_server.model.facts import ModelFacts
from layertap_server.model.tokenized import Tokenized
from layertap_server.model.tokenizer import Item
from layertap_server.protocol import token_ids
from layertap_server.protocol.responses import LEAST_TOKEN_BYTES
from layertap_server.types import OutputKind, Plan, Text

ID_BYTES: Final = 4
"""What one token id of a Decode request counts against the size of its answer."""

_WITHOUT_PROMPT: Final = {"words": "words", "token_ids": "token ids"}


def check_text_count(count: int, limits: Limits) -> None:
    """Checks how many texts a request has.

    Raises:
        InvalidArgumentError: if there are none, or too many.
    """
    if not count:
        raise InvalidArgumentError("inputs is empty; send at least one text")
    if count > limits.max_text_count:
        raise InvalidArgumentError(
            f"inputs has {count} texts, the most is {limits.max_text_count}; "
            "use embed_stream (the RPC EmbedStream) for any number of texts"
        )


def check_padding(pad_to: int, max_length: int, text_count: int, limits: Limits) -> None:
    """Checks the padding that Tokenize is asked for, by its range and by the size of the answer.

    Raises:
        InvalidArgumentError: if either is out of bounds.
    """
    if not 0 <= pad_to <= max_length:
        raise InvalidArgumentError(f"pad_to is {pad_to}; it runs from 1 to max_length {max_length}, 0 means none")
    check_answered_tokens(pad_to * text_count, limits)


def check_answered_tokens(count: int, limits: Limits) -> None:
    """Checks how many tokens, padding included, a Tokenize answer has to hold.

    Raises:
        InvalidArgumentError: if even the shortest tokens would not fit.
    """
    if count * LEAST_TOKEN_BYTES > limits.max_response_bytes:
        raise InvalidArgumentError(
            f"the answer would have {count} tokens, at least {count * LEAST_TOKEN_BYTES} bytes, the most is "
            f"{limits.max_response_bytes} bytes; send fewer texts at once, or pad less"
        )


def items(
    messages: Sequence[pb.Input], labels: Sequence[str], model: ModelFacts, limits: Limits, *, prompt: str = ""
) -> list[Item | LayertapError]:
    """Returns texts with their prompt, ready for the tokenizer, and of those at fault why."""
    found: list[Item | LayertapError] = []
    given: dict[int, pb.TokenIds] = {}
    most = limits.max_character_count - len(prompt)
    for n, message in enumerate(messages):
        kind = message.WhichOneof("kind")
        if kind == "text" and len(string := message.text) <= most:  # What most are.
            found.append(prompt + string)
            continue
        if kind == "token_ids" and not prompt:
            given[n] = message.token_ids
            continue
        try:
            found.append(_item(message, kind, labels[n], limits, prompt))
        except LayertapError as exc:
            found.append(exc)
    if not given:
        return found
    texts = token_ids.texts([*given.values()], [labels[n] for n in given], model)
    if len(texts) == len(messages):
        return [*texts]
    for n, text in zip(given, texts, strict=True):
        found.insert(n, text)
    return found


def _item(message: pb.Input, kind: str | None, label: str, limits: Limits, prompt: str) -> Item:
    """Returns one text with its prompt; token ids are none.

    Raises:
        InvalidArgumentError: if it is at fault; the error names its label.
    """
    found: Item
    if kind == "text":
        found = prompt + message.text
        size = len(found)
    elif prompt and kind in _WITHOUT_PROMPT:
        raise InvalidArgumentError(
            f"{label} is {_WITHOUT_PROMPT[kind]}, before which no prompt can be put; send a string or a pair, or "
            "leave the prompt out"
        )
    elif kind == "pair":
        found = prompt + message.pair.first, message.pair.second
        size = len(found[0]) + len(found[1])
    elif kind == "words":
        if len(message.words.words) > limits.max_character_count:
            raise InvalidArgumentError(
                f"{label} has {len(message.words.words)} words, the most is {limits.max_character_count}; "
                "split it into several texts"
            )
        found = list(message.words.words)
        size = sum(map(len, found)) + len(found)
    else:
        raise InvalidArgumentError(f"{label} has no kind; set text, pair, words or token_ids")
    if size > limits.max_character_count:
        raise InvalidArgumentError(
            f"{label} has {size} characters, the most is {limits.max_character_count}; split it into several texts"
        )
    return found


def most_plain_tokens(plan: Plan, model: ModelFacts, limits: Limits) -> int:
    """Returns up to how many tokens a plain text is within all that `check_fits` and `check_tokenized` check of each.

    A plain text has neither masks nor types nor windows. 0: plans with words, spans, special tokens or a prompt need
    more of each text.
    """
    pools = [pool for output in plan.outputs for pool in output.pools]
    if plan.has_words or plan.has_spans or any(pool.exclude_special_tokens or pool.first_row for pool in pools):
        return 0
    sizes = plan.byte_counts

    def byte_count(tokens: int) -> int:
        return max((sizes.token + sizes.token_pair * tokens) * tokens + sizes.text, plan.mix_token_bytes * tokens)

    return bisect.bisect_right(range(1, model.max_length + 1), limits.max_call_output_bytes, key=byte_count)


def are_plain(results: Sequence[Tokenized | LayertapError], most_tokens: int) -> bool:
    """Returns whether all texts that are not refused are plain and have so many tokens at most, but some.

    The ids of a tokenizer are within the vocabulary, which is checked when it is loaded; those of a caller are checked
    as they are read.
    """
    for result in results:
        if isinstance(result, LayertapError):
            continue
        text = result.text
        if not 0 < len(text.input_ids) <= most_tokens or text.windows is not None:
            return False
        if text.attention_mask is not None or text.token_type_ids is not None:
            return False
    return True


def check_fits(text: Text, label: str, model: ModelFacts) -> None:
    """Checks that the model can compute a text, whatever the tokenizer made of it.

    Raises:
        InvalidArgumentError: if it has no tokens, too many, or an id or a type outside the model's.
    """
    if not text.token_count:
        raise InvalidArgumentError(
            f"{label} has no tokens, and this model's tokenizer adds none to it; leave the text out, or send token_ids"
        )
    if text.windows is None and text.token_count > model.max_length:
        raise InvalidArgumentError(
            f"{label} has {text.token_count} tokens, this model has {model.max_length} positions; shorten it"
        )
    if (highest := int(text.input_ids.max())) >= model.vocab_size:
        raise InvalidArgumentError(
            f"{label} has token id {highest}, this model's vocabulary ends at {model.vocab_size - 1}: its tokenizer "
            "does not belong to it; leave the text out, or serve the model with its own tokenizer"
        )
    types = text.token_type_ids
    if types is not None and model.type_vocab_size and types.max() >= model.type_vocab_size:
        raise InvalidArgumentError(
            f"{label} has token type {types.max()}, this model has {model.type_vocab_size}: it takes no pairs; send "
            "the two strings as one text, or as two"
        )


def check_tokenized(plan: Plan, result: Tokenized, label: str, limits: Limits) -> Tokenized:
    """Returns a tokenized text, with its words if the plan needs them.

    Raises:
        InvalidArgumentError: if this text cannot give what the plan asks.
    """
    if plan.has_words:
        if result.encoding is None:
            raise InvalidArgumentError(
                f"{label} is token ids, which have no words; send text or words, or ask for hidden_states"
            )
        result = result.split()
    text = result.text
    if (size := plan.held_bytes(text)) > limits.max_call_output_bytes:
        raise InvalidArgumentError(
            f"the outputs of {label} take {size} bytes, the most is {limits.max_call_output_bytes}; ask for fewer "
            f"layers at once, or shorten it{_attentions_of(plan, text)}{_windows_of(text)}"
        )
    longest = text.token_count if text.windows is None else text.windows.max_length
    if (size := plan.mix_token_bytes * longest) > limits.max_call_output_bytes:
        raise InvalidArgumentError(
            f"the mixes of {label} take {size} bytes until they are complete, the most is "
            f"{limits.max_call_output_bytes}; ask for fewer mixes at once, or shorten it"
        )
    for output in plan.outputs:
        if any(pool.is_empty(text) for pool in output.pools):
            raise InvalidArgumentError(
                f"{label} has nothing to pool over: every token is masked, special or a prompt's; unmask some, "
                "include special tokens, or leave the prompt out"
            )
    return result


def _attentions_of(plan: Plan, text: Text) -> str:
    """Returns what the attentions of a text are made of, as the end of an error message; empty: none are asked for."""
    return "".join(
        f" (attentions of {len(output.layers)} layers and {len(output.heads)} heads for {text.token_count} tokens: "
        "ask for fewer of them)"
        for output in plan.outputs
        if output.kind is OutputKind.ATTENTIONS
    )


def _windows_of(text: Text) -> str:
    """Returns what else makes the outputs of a text that runs as windows smaller, as the end of an error message."""
    return "" if text.windows is None else f" (it has {text.token_count} tokens: ask for dtype float16, or for pools)"


def check_decode(texts: Sequence[pb.TokenIds], limits: Limits) -> list[int]:
    """Returns how many ids each text of a Decode request has, once all counts are within the limits.

    Raises:
        InvalidArgumentError: if there are no texts, too many texts, or too many ids.
    """
    if not texts:
        raise InvalidArgumentError("texts is empty; send at least one text")
    if len(texts) > limits.max_text_count:
        raise InvalidArgumentError(
            f"texts has {len(texts)} entries, the most is {limits.max_text_count}; send them in several requests"
        )
    counts = [len(text.input_ids) for text in texts]
    for n, count in enumerate(counts):
        if count > limits.max_character_count:
            raise InvalidArgumentError(
                f"texts[{n}].input_ids has {count} entries, the most is {limits.max_character_count}; "
                "split it into several texts"
            )
    if sum(counts) * ID_BYTES > limits.max_response_bytes:
        raise InvalidArgumentError(
            f"texts has {sum(counts)} token ids, the most is {limits.max_response_bytes // ID_BYTES}; "
            "send them in several requests"
        )
    return counts
