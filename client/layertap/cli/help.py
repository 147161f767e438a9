"""What `--help` says below the flags: examples, rules and exit codes."""

from __future__ import annotations

from typing import Final

TOKENIZE: Final = """\
examples:
  layertap tokenize 'I love Paris' --pad-to 7
  layertap tokenize --json < texts.txt"""

DECODE: Final = """\
examples:
  layertap decode 101 1045 2293 3000 102
  layertap decode --keep-special-tokens < ids.txt"""

EMBED: Final = """\
examples:
  layertap embed 'I love Paris' --layers all
  layertap embed --pooling mean --json < texts.txt
  layertap embed corpus.txt --layers=-1,-2 --pooler-output -o out.npz
  layertap embed corpus.jsonl --id-field id --pooling mean --normalize -o out.parquet
  layertap embed corpus.jsonl --words mean --mix mean:-4,-3,-2,-1 -o out.arrow
  zcat corpus.jsonl.gz | layertap embed --input-format jsonl --pooling cls -o out.safetensors

OUT holds ids, token_counts, truncated, and what was asked for: layer_K, mixed, words_layer_K, words_mixed, pool_N,
pooler_output. Rows of tokens and words lie one text after the other in .npz and .safetensors (divide them by
token_counts and word_counts), in lists in .parquet and .arrow. .npy holds one matrix with a row a text, and no ids.

OUT is made from parts in the folder OUT.parts, which goes away in the end. Whatever ends the command before, the same
command goes on after the last part and makes the same OUT. It refuses other settings, another model, and an input that
is another one as far as it was done. Items that cannot be embedded are told in a side file, out.errors.jsonl for
out.npz, with number, id, code and reason, and the others go on."""

INFO: Final = """\
example:
  layertap info --target 10.0.0.7:50051"""

HEALTH: Final = """\
example:
  layertap health --timeout-s 2 || restart"""

ALL: Final = """\
examples:
  layertap tokenize 'I love Paris'
  layertap embed 'I love Paris' --layers all
  layertap embed corpus.txt --pooling mean -o out.npz
  layertap decode 101 1045 2293 3000 102
  layertap health && layertap info
  layertap embed --help

Texts are arguments, the lines of a file, or lines of stdin; an empty line is a text. Before a text that begins with a
dash write --, before negative layers = (--layers=-1,-2). LAYERTAP_TARGET and LAYERTAP_TIMEOUT_S replace the
defaults; LAYERTAP_TLS_CA, LAYERTAP_TLS_CERT, LAYERTAP_TLS_KEY and LAYERTAP_TOKEN say how to come in.

exit codes:
  0    done; health: the server serves
  1    the server refused, failed, did not answer or is not serving; or a file cannot be read or written
  2    wrong usage, or a file would be spoiled
  3    done, but for some items
  130  Ctrl-C
  141  whoever read stdout has left"""
