"""Texts that tokenizers may do odd things with: scripts, marks, special tokens, pairs, words."""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

PROPERTY = settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=True,  # A failure here fails for everyone.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

TEXTS = {
    "the empty text": "",
    "spaces only": " \t\n\r\u3000\u00a0 ",
    "english": "The quick brown fox's jump — over 3.14159 lazy dogs; isn't it?",
    "german": "Straßenbahnhaltestelle übergrößenträger ẞ",
    "turkish": "İstanbul ıI",
    "greek": "ΑΒΓ Οδυσσεύς ΣΑΣ",
    "russian": "Москва — столица России",
    "vietnamese": "Tiếng Việt có dấu",
    "hindi": "नमस्ते दुनिया",
    "thai": "สวัสดีชาวโลก",
    "korean": "안녕하세요 세계",
    "chinese": "我爱北京天安门。漢字と仮名",
    "rare chinese": "\U00020000\U0002a6df𠮷野家",
    "japanese": "東京タワーは333メートル",
    "right to left": "שלום עולם مرحبا بالعالم",
    "right to left marks": "abc \u202e שלום \u202c def \u200f",
    "emoji": "😀 I ❤️ 🇫🇷 👍🏽!",
    "joined emoji": "a 👩‍👩‍👧‍👦 family 🏳️‍🌈x",
    "combining": "e\u0301 a\u0308\u0323 \u0301alone Z\u0351\u0352\u0353algo",
    "composed": "é ä résumé naïve",
    "ligatures": "ﬁne ﬂow Å ① ㎏",
    "controls": "a\x00b\x01c\x7fd\u200be\ufefff\u00adg\ufffdh",
    "line breaks": "a\u2028b\u2029c\x85d\x0be\x0cf",
    "specials spelled out": "[CLS] I [MASK] you [SEP] [PAD] [UNK] [cls]",
    "pieces spelled out": "##ing ## #",
    "punctuation": "!!! ... «» „“ ¿? ~`$^+=<>| _",
    "a long word": "a" * 99 + " " + "b" * 100 + " " + "c" * 101,
    "a very long word": "donaudampfschifffahrt" * 60,
    "digits": "1234567890 १२३ ٣٤٥ Ⅷ",
    "mixed scripts": "Paris巴黎Париж باريس",
    "outside the first plane": "𝒳𝔘 𐍈 𓀀 🀄",
}
PAIRS = [("I love Paris", "so does she"), ("", "x"), ("x", ""), ("", ""), ("東京 👩‍👩‍👧", "e\u0301 [SEP] e")]
WORDS = [
    ["I", "love", "Paris"],
    ["tokenization", "", "embeddings"],
    [""],
    ["", "", "x", ""],
    ["two words", "don't", "東京", "👩‍👩‍👧‍👦", " padded "],
    ["x" * 101, "y"],
]
EVERYTHING: list[Any] = [*TEXTS.values(), *PAIRS, *WORDS]
