"""The file of bearer tokens: one `name token` or `name:token` on a line, `#` for remarks.

A name may have several tokens, so that a new one can be handed out before the old one goes. Only digests are kept, and
whoever tries one is compared with all of them in constant time.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from typing import Final

log = logging.getLogger(__name__)

MIN_TOKEN_LENGTH: Final = 16

_LINE: Final = re.compile(r"(?P<name>[^\s:#]+)(?:\s*:\s*|\s+)(?P<token>[!-~]+)")


class Tokens:
    """Who may come in, and by what name."""

    def __init__(self, text: str) -> None:
        """Reads the text of a file.

        Raises:
            ValueError: A line is at fault; the message names it and tells nothing of what is in it.
        """
        self._digests: list[tuple[str, bytes]] = []
        for number, line in enumerate(text.splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            found = _LINE.fullmatch(line)
            if found is None:
                raise ValueError(f"line {number} is neither `name token` nor `name:token`; correct it")
            if len(found["token"]) < MIN_TOKEN_LENGTH:
                raise ValueError(
                    f"line {number} has a token of fewer than {MIN_TOKEN_LENGTH} characters; "
                    "make one with: openssl rand -hex 32"
                )
            digest = _digest(found["token"])
            if any(digest == other and found["name"] != name for name, other in self._digests):
                raise ValueError(f"line {number} gives a token to a second name; make another one")
            self._digests.append((found["name"], digest))
        if not self._digests:
            raise ValueError("it has no token; add a line `name token`")

    def name_of(self, token: str) -> str | None:
        """Returns whose token this is; None: nobody's."""
        given, found = _digest(token), None
        for name, digest in self._digests:
            if hmac.compare_digest(given, digest):
                found = name
        return found


def read(path: str) -> Tokens:
    """Reads a file of tokens; warns if others than its owner and group may read it.

    Raises:
        OSError: It cannot be read.
        ValueError: A line is at fault.
    """
    with open(path, encoding="utf-8") as file:
        if os.fstat(file.fileno()).st_mode & stat.S_IROTH:
            log.warning("the token file can be read by everybody on this host: chmod o-rwx it")
        return Tokens(file.read())


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
