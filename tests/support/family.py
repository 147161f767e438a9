"""A tiny random model and a tiny trained tokenizer of each model type, saved by transformers. It imports torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, normalizers, pre_tokenizers, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog, while tokenization-aware embeddings sleep in Paris.",
    "I love Paris, and so does she; you love Rome, and we all love Berlin.",
    "Résumé, naïve café: 東京 and Москва are cities; 3.14159 is a number, and :-) is a smile.",
    "Le renard brun saute par-dessus le chien paresseux, et personne ne s'étonne à Kraków.",
]
WITHOUT_POOLER = ("distilbert", "electra")
_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_OWN = {"distilbert": {"hidden_dim": 64}, "electra": {"intermediate_size": 64, "embedding_size": 24}}
_POSITIONS = 66


def _bpe() -> dict[str, Any]:
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=350, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    found = json.loads(trained.to_str())["model"]
    return {"vocab": found["vocab"], "merges": [tuple(merge) for merge in found["merges"]]}


def _unigram(special: list[str]) -> list[tuple[str, float]]:
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=150, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    vocabulary = trained.get_vocab()
    return [(piece, -float(token_id) / 10) for piece, token_id in sorted(vocabulary.items(), key=lambda one: one[1])]


def _wordpiece() -> dict[str, int]:
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trained.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    vocabulary: dict[str, int] = trained.get_vocab()
    return vocabulary


TOKENIZERS: Mapping[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertTokenizer(vocab=_wordpiece(), model_max_length=_POSITIONS),
    "camembert": lambda: transformers.CamembertTokenizer(
        vocab=_unigram(["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>"]),
        model_max_length=_POSITIONS - 2,
    ),
    "distilbert": lambda: transformers.DistilBertTokenizer(vocab=_wordpiece(), model_max_length=_POSITIONS),
    "electra": lambda: transformers.ElectraTokenizer(vocab=_wordpiece(), model_max_length=_POSITIONS),
    "roberta": lambda: transformers.RobertaTokenizer(**_bpe(), model_max_length=_POSITIONS - 2),
    "xlm-roberta": lambda: transformers.XLMRobertaTokenizer(
        vocab=_unigram(["<s>", "<pad>", "</s>", "<unk>"]), model_max_length=_POSITIONS - 2
    ),
}


def save(kind: str, folder: Path, *, seed: int = 0, pooler: bool = True, spread: float = 0.3, **settings: Any) -> Path:
    """Saves a model of a type with its tokenizer; all weights differ from their neutral values.

    Args:
        kind: The type.
        folder: Where to.
        seed: Of the weights.
        pooler: Whether a type that may have a pooler has one.
        spread: The standard deviation of matrices and embeddings.
        settings: What config.json says otherwise, under BERT's keys or the type's own.
    """
    tokenizer = TOKENIZERS[kind]()
    given = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": _POSITIONS,
        **_SIZES,
        **_OWN.get(kind, {"intermediate_size": 64}),
    }
    config = transformers.AutoConfig.for_model(kind, **given | settings)
    options = {} if pooler or kind in WITHOUT_POOLER else {"add_pooling_layer": False}
    torch.manual_seed(seed)
    model = transformers.AutoModel.from_config(config, **options)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_scale = "norm" in name.lower() and name.endswith("weight")
            weight.copy_(is_scale + torch.randn(weight.shape) * (0.1 if is_scale else spread))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
