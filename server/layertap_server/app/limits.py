"""The limits that the settings put in force: those of each process, of requests, and for the longest text."""

from __future__ import annotations

import dataclasses

from layertap.types import Limits
from layertap_server.config import Config, ConfigError
from layertap_server.flags import flag


def share_of(config: Config) -> Config:
    """Returns what each process gets of the settings of a server.

    Raises:
        ConfigError: if that is too little for one full request.
    """
    if config.processes == 1:
        return config
    shared = [field.name for field in dataclasses.fields(config) if field.metadata["shared"]]
    parts = {name: getattr(config, name) // config.processes for name in shared}
    parts["max_call_output_bytes"] = min(config.max_call_output_bytes, parts["max_output_bytes"])
    try:
        return dataclasses.replace(config, **parts)
    except ConfigError as exc:
        raise ConfigError(f"shared out to {config.processes} processes, {exc}") from exc


def check_output_bytes(share: Config, longest_text_bytes: int) -> None:
    """Checks that one longest text with all layers fits the memory for outputs of a process.

    Raises:
        ConfigError: if it does not: its caller would wait for ever.
    """
    for name in ("max_output_bytes", "max_call_output_bytes"):
        if getattr(share, name) < longest_text_bytes:
            shared = f"shared out to {share.processes} processes, " if share.processes > 1 else ""
            raise ConfigError(
                f"{shared}{flag(name)} is {getattr(share, name)}, "
                f"but one longest text with all layers takes {longest_text_bytes}; raise it"
            )


def cpu_batch_bytes(instance_count: int, max_call_output_bytes: int) -> int:
    """Returns how many output bytes a batch has at most on a CPU, where no setting says it.

    48 MiB hold all layers of 1024 tokens in the shape of bert-base. With larger batches a call could not hold one more
    than there are instances, so that some would wait for its caller to read.
    """
    return min(max(max_call_output_bytes // (instance_count + 1), 32 << 20), 48 << 20)


def limits_of(config: Config) -> Limits:
    """Returns the limits of requests, as GetModelInfo states them."""
    alike = {field.name for field in dataclasses.fields(Limits)} & {field.name for field in dataclasses.fields(Config)}
    return Limits(
        **{name: getattr(config, name) for name in alike},
        stall_time_ns=int(config.stall_timeout_s * 1e9),
        grace_time_ns=int(config.grace_s * 1e9),
        max_connection_age_ns=int(config.max_connection_age_s * 1e9),
        max_window_count=config.max_windows,
    )
