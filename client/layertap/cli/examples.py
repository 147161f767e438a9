"""What `--help` says below the arguments: examples, and what one must know to read an answer."""

from __future__ import annotations

from typing import Final

EXPLORE: Final = """\
examples:
  layertap explore
  layertap explore --target gpu-box:50051 --no-browser

The page shows tokens, layers as they arrive, how tokens change, likeness, maps, attentions and neighbours, live. It
needs the extra explore. Ctrl-C ends it."""

TOKENIZE: Final = """\
examples:
  layertap tokenize 'I love Paris' --pad-to 7
  layertap tokenize --json < texts.txt"""

DECODE: Final = """\
examples:
  layertap decode 101 1045 2293 3000 102
  layertap decode --keep-special-tokens < ids.txt"""

_FILES: Final = """

OUT is made from parts in the folder OUT.parts, which is removed at the end. If the command is interrupted, the same
command resumes after the last part and makes the same OUT. It refuses other settings, another model, and an input that
has changed where it was done. Parts that are damaged are done again. Items that fail do not stop the others; the side
file OUT.errors.jsonl has the number, id, code and reason of each."""

EMBED: Final = (
    """\
examples:
  layertap embed 'I love Paris' --layers all
  layertap embed --pooling mean --json < texts.txt
  layertap embed corpus.txt --layers -1,-2 --pooler-output -o out.npz
  layertap embed corpus.jsonl.gz --id-field id --keep title,url --pooling mean -o out.parquet
  layertap embed corpus.jsonl --words mean --mix mean:-4,-3,-2,-1 -o out.arrow
  layertap embed 'corpus/*.parquet' --pooling mean --shard 3/100 -o vectors
  zstdcat corpus.jsonl.zst | layertap embed --input-format jsonl --pooling cls -o out.safetensors

OUT holds ids, kept fields, token_counts, truncated, and what was requested: layer_K, mixed, words_layer_K,
words_mixed, attentions_K, pool_N, pooler_output. Rows of tokens and words lie one text after the other in .npz and
.safetensors (divide them by token_counts and word_counts), in lists in .parquet and .arrow; attentions_K has a row for
each pair of tokens, with a value for each head. .npy holds one matrix with a row a text, and no ids."""
    + _FILES
)

ENCODE: Final = (
    """\
examples:
  layertap encode 'I love Paris' --json
  layertap encode corpus.jsonl --id-field id -o out.parquet
  layertap encode queries.txt --prompt-name query --normalize -o queries.npy
  layertap encode corpus.csv --text-field body --precision int8 -o out.npz

One vector a text, as Client.encode and sentence-transformers make it: the model's folder says how texts are pooled,
normalized, cut and prompted. OUT holds ids, kept fields, token_counts, truncated, and sentence_embedding or
token_embeddings."""
    + _FILES
)

INFO: Final = """\
example:
  layertap info --target 10.0.0.7:50051"""

HEALTH: Final = """\
example:
  layertap health --timeout-s 2 || echo 'not serving'"""

COMPLETION: Final = """\
bash, in ~/.bashrc:
  source <(layertap completion bash)

zsh, in ~/.zshrc:
  source <(layertap completion zsh)

The script is fixed once it is made: a file that it is written to starts faster than the command."""

ALL: Final = """\
examples:
  layertap tokenize 'I love Paris'
  layertap embed 'I love Paris' --layers all
  layertap embed corpus.txt --pooling mean -o out.npz
  layertap encode corpus.jsonl -o out.parquet
  layertap decode 101 1045 2293 3000 102
  layertap health && layertap info
  layertap embed --help

Texts are arguments, the lines of a file, or lines of stdin; an empty line is a text. An argument that looks like a file
is one; --text says that it is a text. Before a text that begins with a dash write --. What a command's help has in
brackets is the default. LAYERTAP_TARGET and LAYERTAP_TIMEOUT_S replace those of the server; LAYERTAP_TLS_CA,
LAYERTAP_TLS_CERT, LAYERTAP_TLS_KEY and LAYERTAP_TOKEN encrypt and identify.

exit codes:
  0    done; health: the server serves
  1    the server refused, failed, did not answer or is not serving; or a file cannot be read or written
  2    wrong usage, or a file would be lost
  3    done, but some items failed
  130  Ctrl-C
  141  the reader of stdout closed it"""
