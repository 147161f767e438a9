"""Every knob of the server: one field each, with its type, default, unit, reason and bounds.

The command line, its help and the environment variables are made from this class; see `cli`.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from typing import Any


class ConfigError(Exception):
    """A knob has a value that it cannot have; the message is one line that names its flag."""


def _knob(
    default: Any,
    reason: str,
    *,
    group: str,
    unit: str = "",
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
) -> Any:
    metadata = {"reason": reason, "group": group, "unit": unit, "choices": choices, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one server."""

    model_id: str = _knob(
        "",
        "A folder with a BERT checkpoint, or a hub name such as bert-base-uncased. Empty: the embedded model.",
        group="model",
    )
    revision: str = _knob("", "The branch, tag or commit of a hub model. Empty: its default.", group="model")
    model_name: str = _knob(
        "", "What clients see as model_id. Empty: the hub name, or the folder's last part.", group="model"
    )
    load_format: str = _knob(
        "safetensors",
        "dummy makes seeded random weights from config.json alone, to measure a shape without its weights.",
        choices=("safetensors", "dummy"),
        group="model",
    )
    seed: int = _knob(0, "The seed of dummy weights.", group="model", least=0, most=(1 << 63) - 1)
    device: str = _knob(
        "auto", "auto (cuda if it is there), cpu, cuda (all of them), or a list such as cuda:0,cuda:1.", group="device"
    )
    dtype: str = _knob(
        "float32",
        "What matrices are multiplied in; the residual stream stays float32. float32 is within 2e-5 of transformers "
        "in every value, bfloat16 and float16 within 0.1. auto: bfloat16 on a GPU that has it, else float32. float16 "
        "needs cuda.",
        choices=("float32", "auto", "bfloat16", "float16"),
        group="device",
    )
    instances: int = _knob(
        0,
        "Engine threads on the CPU. 0: one for each core; cuda has two for each device.",
        least=0,
        group="device",
        most=1024,
    )
    instance_threads: int = _knob(
        0, "CPU threads each instance computes with. 0: the cores, shared out.", least=0, group="device", most=1024
    )
    host: str = _knob(
        "127.0.0.1",
        "The address to listen on, or unix:/path for a unix socket. Other than loopback it needs --tls-cert.",
        group="listening",
    )
    port: int = _knob(
        50051, "The port to listen on. 0: any free one, which is printed.", least=0, group="listening", most=65_535
    )
    tls_cert: str = _knob(
        "",
        "The file of the server's certificate in PEM, with those between it and the root. Like all files of TLS and "
        "tokens it is read again when it changes. Empty: plaintext.",
        group="listening",
    )
    tls_key: str = _knob("", "The file of the certificate's key in PEM, not encrypted.", group="listening")
    tls_client_ca: str = _knob(
        "",
        "The file of the certificates in PEM that sign those of clients. Empty: clients need none.",
        group="listening",
    )
    token_file: str = _knob(
        "",
        "The file of bearer tokens, a line `name token` each; all but health then asks for one. Empty: none is needed.",
        group="listening",
    )
    insecure_listen: bool = _knob(False, "Listens in plaintext on an address that others can reach.", group="listening")
    max_text_count: int = _knob(
        1000,
        "Texts in one request; embed_stream has no such limit.",
        unit="texts",
        least=1,
        group="one request",
        most=1_000_000,
    )
    max_character_count: int = _knob(
        100_000,
        "Unicode code points in one text, so that no single one holds up the tokenizer.",
        unit="characters",
        least=1,
        group="one request",
        most=1 << 40,
    )
    max_request_bytes: int = _knob(
        8 << 20,
        "One request message, also once it is decompressed; above it gRPC itself refuses. Each call under way may hold "
        "as much of a message that is not yet whole.",
        unit="bytes",
        least=1 << 16,
        group="one request",
        most=(1 << 31) - 1,
    )
    max_response_bytes: int = _knob(
        (4 << 20) - (64 << 10),
        "One unary answer; clients of every language take 4 MiB unless told otherwise.",
        unit="bytes",
        least=1 << 16,
        group="one request",
        most=(1 << 31) - 1,
    )
    max_frame_bytes: int = _knob(
        1 << 20, "One streamed message.", unit="bytes", least=1 << 14, group="one request", most=(1 << 31) - 1
    )
    max_batch_tokens: int = _knob(
        0,
        "Tokens in one batch. 0: 1024 on a CPU, where more is no faster, 32768 on cuda, which wants to be filled.",
        unit="tokens",
        least=0,
        group="batches and the queue",
        most=1 << 40,
    )
    max_batch_bytes: int = _knob(
        32 << 20,
        "Output bytes of one batch; a call may hold one batch more than there are instances.",
        unit="bytes",
        least=1,
        group="batches and the queue",
        most=1 << 40,
    )
    min_share_tokens: int = _knob(
        256,
        "What an instance takes at least while other instances idle: less is not worth splitting.",
        unit="tokens",
        least=1,
        group="batches and the queue",
        most=1 << 40,
    )
    max_queue_text_count: int = _knob(
        8192,
        "Texts that may wait; above it callers are refused at once.",
        unit="texts",
        least=1,
        group="batches and the queue",
        most=1 << 40,
    )
    max_queue_token_count: int = _knob(
        1 << 20, "Tokens that may wait, likewise.", unit="tokens", least=1, group="batches and the queue", most=1 << 40
    )
    max_queue_bytes: int = _knob(
        256 << 20,
        "What the requests of calls under way take, with all that is made of them; above it callers are refused at "
        "once, and streams wait.",
        unit="bytes",
        least=1 << 16,
        group="batches and the queue",
        most=1 << 40,
    )
    max_output_bytes: int = _knob(
        512 << 20,
        "Computed but unsent tensors, all calls together.",
        unit="bytes",
        least=1,
        group="memory for outputs",
        most=1 << 40,
    )
    max_call_output_bytes: int = _knob(
        128 << 20,
        "Computed but unsent tensors of one call.",
        unit="bytes",
        least=1,
        group="memory for outputs",
        most=1 << 40,
    )
    shared_memory_bytes: int = _knob(
        0,
        "Memory shared with each client on this host that asks for it, so that layers need not travel: a few answers "
        "that are in use at once. 0: none.",
        unit="bytes",
        least=0,
        group="memory for outputs",
        most=1 << 40,
    )
    max_shared_memory_call_count: int = _knob(
        16,
        "Clients that memory is shared with at once; the others get bytes.",
        unit="calls",
        least=1,
        group="memory for outputs",
        most=100_000,
    )
    max_concurrent_call_count: int = _knob(
        256, "Calls under way at once.", unit="calls", least=1, group="batches and the queue", most=1_000_000
    )
    max_connection_count: int = _knob(
        256,
        "Connections at once; more are closed as they come.",
        unit="connections",
        least=1,
        group="listening",
        most=1_000_000,
    )
    grace_s: float = _knob(
        30.0,
        "How long running calls may take to finish after SIGTERM.",
        unit="seconds",
        least=0,
        group="stopping",
        most=86_400,
    )
    stall_timeout_s: float = _knob(
        60.0,
        "How long a request may take to come whole, and an answer may stay unread, before the call ends.",
        unit="seconds",
        least=0.1,
        group="one request",
        most=86_400,
    )
    idle_timeout_s: float = _knob(
        300.0,
        "How long an EmbedStream may send nothing while nothing is owed to it, before it ends. In a full server it "
        "ends sooner, for a call that needs its place.",
        unit="seconds",
        least=0.1,
        group="one request",
        most=86_400,
    )
    max_connection_age_s: float = _knob(
        0.0,
        "How old a connection may get before its client is asked to connect anew, so that a balancer can choose "
        "another server; its calls then have --grace-s to finish. 0: any age.",
        unit="seconds",
        least=0,
        group="listening",
        most=2_000_000,
    )
    keepalive_time_s: float = _knob(
        30.0,
        "How long a connection may be silent before it is asked whether it still lives.",
        unit="seconds",
        least=1,
        group="listening",
        most=86_400,
    )
    keepalive_timeout_s: float = _knob(
        10.0,
        "How long it may take to answer that, before it is given up with all its calls.",
        unit="seconds",
        least=1,
        group="listening",
        most=86_400,
    )
    instance_timeout_s: float = _knob(
        300.0,
        "How long an instance may make no progress with a batch before it is given up; without any the server ends.",
        unit="seconds",
        least=0.1,
        group="stopping",
        most=86_400,
    )
    metrics_port: int = _knob(
        -1,
        "The port that Prometheus reads metrics from, over HTTP. 0: any free one, which is printed; -1: none.",
        least=-1,
        group="logs, metrics and traces",
        most=65_535,
    )
    metrics_host: str = _knob(
        "127.0.0.1",
        "The address of that port. Metrics tell no texts, but who reads them is not asked for a token.",
        group="logs, metrics and traces",
    )
    traces: str = _knob(
        "off",
        "otlp sends OpenTelemetry spans to where the OTEL_EXPORTER_OTLP_… variables say; it needs layertap[otel].",
        choices=("off", "otlp"),
        group="logs, metrics and traces",
    )
    log_level: str = _knob(
        "info", "What is logged.", choices=("debug", "info", "warning", "error"), group="logs, metrics and traces"
    )
    log_format: str = _knob(
        "text",
        "text is for people; json is one object a line, for programs.",
        choices=("text", "json"),
        group="logs, metrics and traces",
    )

    def __post_init__(self) -> None:
        """Checks every knob.

        Raises:
            ConfigError: One is out of its bounds, or two contradict each other.
        """
        for field in dataclasses.fields(self):
            value, choices, least = getattr(self, field.name), field.metadata["choices"], field.metadata["least"]
            if choices and value not in choices:
                raise ConfigError(f"{flag(field.name)} is {value!r}; choose one of {', '.join(choices)}")
            most = field.metadata["most"]
            if least is not None and not least <= value:
                raise ConfigError(f"{flag(field.name)} is {value}; the least is {least}")
            if most is not None and not value <= most:
                raise ConfigError(f"{flag(field.name)} is {value}; the most is {most}")
        self._check_listening()
        if self.max_queue_bytes < self.max_request_bytes:
            raise ConfigError(
                f"--max-queue-bytes is {self.max_queue_bytes}, below --max-request-bytes {self.max_request_bytes}: "
                "a full request would never be admitted; raise the one or lower the other"
            )
        if self.max_queue_text_count < self.max_text_count:
            raise ConfigError(
                f"--max-queue-text-count is {self.max_queue_text_count}, below --max-text-count {self.max_text_count}: "
                "a full request would never be admitted; raise the one or lower the other"
            )
        if self.max_call_output_bytes > self.max_output_bytes:
            raise ConfigError(
                f"--max-call-output-bytes is {self.max_call_output_bytes}, "
                f"above --max-output-bytes {self.max_output_bytes}; lower the one or raise the other"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this host can reach the server."""
        if self.host == "localhost" or self.host.startswith(("unix:", "unix-abstract:")):
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def _check_listening(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            given, missing = ("tls_cert", "tls_key") if self.tls_cert else ("tls_key", "tls_cert")
            raise ConfigError(f"{flag(given)} is given without {flag(missing)}; give both, or neither for plaintext")
        if self.tls_client_ca and not self.tls_cert:
            raise ConfigError("--tls-client-ca is given without --tls-cert and --tls-key; give these too")
        if not (self.tls_cert or self.is_local or self.insecure_listen):
            raise ConfigError(
                f"--host is {self.host}, which others can reach, and nothing would be encrypted; "
                "give --tls-cert and --tls-key, or listen on 127.0.0.1, or say --insecure-listen"
            )

    def check_output_bytes(self, longest_text_bytes: int) -> None:
        """Checks that one longest text with all layers fits the memory for outputs.

        Raises:
            ConfigError: It does not, so that its caller would wait for ever.
        """
        for name in ("max_output_bytes", "max_call_output_bytes"):
            if getattr(self, name) < longest_text_bytes:
                raise ConfigError(
                    f"{flag(name)} is {getattr(self, name)}, "
                    f"but one longest text with all layers takes {longest_text_bytes}; raise it"
                )


def flag(name: str) -> str:
    """Returns the command line flag of a knob."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """Returns the environment variable of a knob."""
    return "LAYERTAP_" + name.upper()
