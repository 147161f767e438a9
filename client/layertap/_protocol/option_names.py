"""The names of options: which a method has, and what does the work of those that transformers has.

Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

_ARRAYS: Final = "answers are numpy arrays; to_torch() of an embedding makes tensors of them"
_TOKENS: Final = "tokens always have them: tokenize(texts), or embed(texts, return_tokens=True).tokens"
_WINDOWS: Final = "texts above the length run as windows with embed(texts, windows=Windows(stride=…))"
_PADDING: Final = "padded arrays need no option, and tokenize(texts, pad_to=…) adds padding tokens"
_BY_SERVER: Final = "the server has its own; leave it out"

_INSTEAD: Final = {
    "add_special_tokens": "embed(tokenize(texts, add_special_tokens=False)) embeds texts without them",
    "batch_size": _BY_SERVER,
    "convert_to_tensor": _ARRAYS,
    "device": _BY_SERVER,
    "is_split_into_words": "pass each text as a list of its words",
    "layer": "pass embed(texts, layers=…)",
    "normalize": 'pass embed(texts, pooling=Pooling("mean", normalize=True)), or encode(…, normalize_embeddings=True)',
    "output_attentions": 'pass embed(texts, attentions="all")',
    "output_hidden_states": 'pass embed(texts, layers="all")',
    "pad_to_multiple_of": _PADDING,
    "padding": _PADDING,
    "return_attention_mask": _TOKENS,
    "return_dict": "to_tuple() of an embedding makes a tuple",
    "return_offsets_mapping": _TOKENS,
    "return_overflowing_tokens": _WINDOWS,
    "return_special_tokens_mask": _TOKENS,
    "return_tensors": _ARRAYS,
    "return_token_type_ids": _TOKENS,
    "stride": _WINDOWS,
    "text_pair": "pass each pair as a tuple of two str",
    "timeout_s": "embed_stream has item_timeout_s= and reconnect_timeout_s=",
}
"""Options of transformers, sentence-transformers and other methods that people pass by habit."""


def check_names(options: Mapping[str, object], kind: type, also: Iterable[str] = ()) -> None:
    """Checks that all options are among the keys of a `TypedDict`.

    Args:
        options: The options.
        kind: The `TypedDict`.
        also: What the method takes besides, for the message.

    Raises:
        TypeError: if one is not; the message says what to pass instead.
    """
    for name in options:
        if name not in kind.__annotations__:
            known = ", ".join(sorted({*kind.__annotations__, *also}))
            instead = _INSTEAD.get(name, f"the options are {known}")
            raise TypeError(f"got an unexpected keyword argument {name!r}; {instead}")
