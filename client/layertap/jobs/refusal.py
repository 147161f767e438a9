"""Why a job does not begin or go on."""

from __future__ import annotations


class JobError(Exception):
    """The job cannot be done as it stands: it would spoil or mix something. Nothing is lost."""
