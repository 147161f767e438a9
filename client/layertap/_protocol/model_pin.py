"""The one model of a client: the first that answers, or the one that its `fingerprint` argument names. Pure."""

from __future__ import annotations

from layertap.errors import FailedPreconditionError
from layertap.types import ModelRef


class ModelPin:
    """Keeps the fingerprint of the first model that answers. Threads may share it."""

    def __init__(self, fingerprint: str | None = None) -> None:
        self._models: list[ModelRef] = []
        if fingerprint is not None:
            self._models.append(ModelRef(model_id="fingerprint=", fingerprint=fingerprint))

    def check(self, model_id: str, fingerprint: str) -> None:
        """Keeps the first model, and checks that each later one is the same.

        Raises:
            FailedPreconditionError: if it is another one; the message names both.
        """
        if not self._models:
            self._models.append(ModelRef(model_id=model_id, fingerprint=fingerprint))
        first = self._models[0]
        if first.fingerprint != fingerprint:
            raise FailedPreconditionError(
                f"another model answers: {model_id!r} with fingerprint {fingerprint[:12]!r}, before it was "
                f"{first.model_id!r} with {first.fingerprint[:12]!r}; a client serves one model, so that vectors are "
                "never mixed: make a new client for the other one, or let target name servers of one model"
            )
