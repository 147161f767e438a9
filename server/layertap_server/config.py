"""Every setting of the server: one field each, with its type, default, unit, reason and bounds.

The command line, its help and the environment variables are made from this class; see `cli` and `flags`.
"""

from __future__ import annotations

import dataclasses
import functools
import ipaddress
import sys

from layertap_server.flags import ConfigError, fault, flag, setting

__all__ = ["Config", "ConfigError"]


_model = functools.partial(setting, group="model")
_device = functools.partial(setting, group="device")
_listening = functools.partial(setting, group="listening")
_request = functools.partial(setting, group="one request")
_batching = functools.partial(setting, group="batches and the queue")
_memory = functools.partial(setting, group="memory for outputs")
_stopping = functools.partial(setting, group="stopping")
_observing = functools.partial(setting, group="logs, metrics and traces")

_MESSAGE_BYTES = (4 << 20) - (64 << 10)
"""Below the 4 MiB that gRPC's clients take, by more than an estimate of a message's size is off."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The settings of one server."""

    model_id: str = _model(
        "", "A folder with a BERT checkpoint, or a hub name such as bert-base-uncased. Empty: the embedded model."
    )
    revision: str = _model("", "The branch, tag or commit of a hub model. Empty: its default.")
    model_name: str = _model("", "What clients see as model_id. Empty: the hub name, or the folder's last part.")
    load_format: str = _model(
        "safetensors",
        "dummy makes seeded random weights from config.json alone, to measure a shape without its weights.",
        choices=("safetensors", "dummy"),
    )
    seed: int = _model(0, "The seed of dummy weights.", least=0, most=(1 << 63) - 1)
    device: str = _device(
        "auto", "auto (cuda if it is there), cpu, cuda (all of them), or a list such as cuda:0,cuda:1."
    )
    dtype: str = _device(
        "float32",
        "What matrices are multiplied in; the residual stream stays float32. float32 is within 2e-5 of transformers "
        "in every value of a token, bfloat16 and float16 within 0.1. auto: bfloat16 on a GPU that has it, else "
        "float32. float16 needs cuda.",
        choices=("float32", "auto", "bfloat16", "float16"),
    )
    instances: int = _device(
        0,
        "Engine threads of each process on the CPU. 0: one for each core; cuda has two for each device.",
        least=0,
        most=1024,
    )
    instance_threads: int = _device(
        0,
        "CPU threads each instance computes with; one where more change the bits. 0: the cores, shared out.",
        least=0,
        most=1024,
    )
    processes: int = _device(
        1,
        "Processes that listen on one port, each with its own instances and its share of the cores. Limits of the "
        "whole server are shared out to them. More than one needs Linux and an address that is no unix socket.",
        least=1,
        most=256,
    )
    host: str = _listening(
        "127.0.0.1",
        "The address to listen on, or unix:/path for a unix socket. Other than loopback it needs --tls-cert.",
    )
    port: int = _listening(50051, "The port to listen on. 0: any free one, which is printed.", least=0, most=65_535)
    http_port: int = _listening(
        -1,
        "The port for clients of OpenAI's API (POST /v1/embeddings) at the same --host, with the same TLS and tokens. "
        "0: any free one, which is printed; -1: none. It needs layertap[http].",
        least=-1,
        most=65_535,
    )
    tls_cert: str = _listening(
        "",
        "The file of the server's certificate in PEM, with those between it and the root. Like all files of TLS and "
        "tokens it is read again when it changes. Empty: plaintext.",
    )
    tls_key: str = _listening("", "The file of the certificate's key in PEM, not encrypted.")
    tls_client_ca: str = _listening(
        "", "The file of the certificates in PEM that sign those of clients. Empty: clients need none."
    )
    token_file: str = _listening(
        "",
        "The file of bearer tokens, a line `name token` each; all but health then asks for one. Empty: none is needed.",
    )
    kserve: bool = _listening(
        False,
        "Also speaks the Open Inference Protocol (KServe V2), on the same port, for clients such as tritonclient.",
    )
    insecure_listen: bool = _listening(False, "Listens in plaintext on an address that others can reach.")
    max_text_count: int = _request(
        1000, "Texts in one request; embed_stream has no such limit.", unit="texts", most=1_000_000
    )
    max_character_count: int = _request(
        100_000, "Unicode code points in one text, so that no single one holds up the tokenizer.", unit="characters"
    )
    max_windows: int = _request(
        1024, "Windows of one text, where a caller lets long texts run as windows.", unit="windows", most=1 << 20
    )
    max_request_bytes: int = _request(
        8 << 20,
        "One request message, also once it is decompressed; above it gRPC itself refuses. Each call under way may hold "
        "as much of a message that is not yet whole.",
        unit="bytes",
        least=1 << 16,
        most=(1 << 31) - 1,
    )
    max_response_bytes: int = _request(
        _MESSAGE_BYTES,
        "One unary answer; clients of every language take 4 MiB unless told otherwise.",
        unit="bytes",
        least=1 << 16,
        most=(1 << 31) - 1,
    )
    max_frame_bytes: int = _request(
        _MESSAGE_BYTES,
        "One streamed message. Each costs both ends 0.1 ms besides its bytes; clients take up to 4 MiB by default.",
        unit="bytes",
        least=1 << 14,
        most=(1 << 31) - 1,
    )
    max_batch_tokens: int = _batching(
        0,
        "Tokens in one batch. 0: 1024 on a CPU, where more is no faster, 32768 on cuda, which wants to be filled. "
        "While several connections send texts, a batch has at most what lately took 50 ms.",
        unit="tokens",
        least=0,
    )
    max_batch_bytes: int = _batching(
        0,
        "Output bytes of one batch; a call may hold one batch more than there are instances. 0: 32 MiB on a CPU, up to "
        "48 MiB if --max-call-output-bytes has room for them; 256 MiB on cuda, where all layers of a batch that fills "
        "it take more.",
        unit="bytes",
        least=0,
    )
    min_share_tokens: int = _batching(
        256, "What an instance takes at least while other instances idle: less is not worth splitting.", unit="tokens"
    )
    max_queue_text_count: int = _batching(
        8192, "Texts that may wait; above it callers are refused at once.", unit="texts", shared=True
    )
    max_queue_token_count: int = _batching(1 << 20, "Tokens that may wait, likewise.", unit="tokens", shared=True)
    max_queue_bytes: int = _batching(
        256 << 20,
        "What the requests of calls under way take, with all that is made of them; above it callers are refused at "
        "once, and streams wait.",
        unit="bytes",
        least=1 << 16,
        shared=True,
    )
    max_output_bytes: int = _memory(
        512 << 20, "Computed but unsent tensors, all calls together.", unit="bytes", shared=True
    )
    max_call_output_bytes: int = _memory(128 << 20, "Computed but unsent tensors of one call.", unit="bytes")
    shared_memory_bytes: int = _memory(
        0,
        "Memory shared with each client on this host that asks for it, so that layers need not travel: a few answers "
        "that are in use at once. 0: none.",
        unit="bytes",
        least=0,
    )
    max_shared_memory_call_count: int = _memory(
        16, "Clients that memory is shared with at once; the others get bytes.", unit="calls", most=100_000, shared=True
    )
    max_concurrent_call_count: int = _batching(
        256, "Calls under way at once.", unit="calls", most=1_000_000, shared=True
    )
    max_connection_count: int = _listening(
        256, "Connections at once; more are closed as they come.", unit="connections", most=1_000_000, shared=True
    )
    grace_s: float = _stopping(
        30.0, "How long running calls may take to finish after SIGTERM.", unit="seconds", least=0
    )
    stall_timeout_s: float = _request(
        60.0,
        "How long a request may take to come whole, and an answer may stay unread, before the call ends.",
        unit="seconds",
        least=0.1,
    )
    idle_timeout_s: float = _request(
        300.0,
        "How long an EmbedStream may send nothing while nothing is owed to it, before it ends. In a full server it "
        "ends sooner, for a call that needs its place.",
        unit="seconds",
        least=0.1,
    )
    max_connection_age_s: float = _listening(
        0.0,
        "How old a connection may get before its client is asked to connect anew, so that a balancer can choose "
        "another server; its calls then have --grace-s to finish. 0: any age.",
        unit="seconds",
        least=0,
        most=2_000_000,
    )
    keepalive_time_s: float = _listening(
        30.0, "How long a connection may be silent before it is asked whether it still lives.", unit="seconds"
    )
    keepalive_timeout_s: float = _listening(
        10.0, "How long it may take to answer that, before it is given up with all its calls.", unit="seconds"
    )
    instance_timeout_s: float = _stopping(
        300.0,
        "How long an instance may make no progress with a batch before it is given up; without any the server ends.",
        unit="seconds",
        least=0.1,
    )
    metrics_port: int = _observing(
        -1,
        "The port that Prometheus reads metrics from, over HTTP. 0: any free one, which is printed; -1: none.",
        least=-1,
        most=65_535,
    )
    metrics_host: str = _observing(
        "127.0.0.1", "The address of that port. Metrics tell no texts, but who reads them is not asked for a token."
    )
    traces: str = _observing(
        "off",
        "otlp sends OpenTelemetry spans to where the OTEL_EXPORTER_OTLP_… variables say; it needs layertap[otel].",
        choices=("off", "otlp"),
    )
    log_level: str = _observing("info", "What is logged.", choices=("debug", "info", "warning", "error"))
    log_format: str = _observing(
        "text", "text is for people; json is one object a line, for programs.", choices=("text", "json")
    )

    def __post_init__(self) -> None:
        """Checks every setting.

        Raises:
            ConfigError: if one is out of its bounds, or two contradict each other.
        """
        for field in dataclasses.fields(self):
            if found := fault(field, getattr(self, field.name)):
                raise ConfigError(found)
        self._check_listening()
        for queue, request in (("max_queue_bytes", "max_request_bytes"), ("max_queue_text_count", "max_text_count")):
            if getattr(self, queue) < getattr(self, request):
                raise ConfigError(
                    f"{flag(queue)} is {getattr(self, queue)}, below {flag(request)} {getattr(self, request)}: "
                    "a full request would never be admitted; raise the one or lower the other"
                )
        if (call := self.max_call_output_bytes) > (most := self.max_output_bytes):
            raise ConfigError(
                f"--max-call-output-bytes is {call}, above --max-output-bytes {most}; lower the one or raise the other"
            )

    @property
    def is_unix(self) -> bool:
        """Whether the server listens on a unix socket."""
        return self.host.startswith(("unix:", "unix-abstract:"))

    @property
    def is_local(self) -> bool:
        """Whether only this host can reach the server."""
        if self.host == "localhost" or self.is_unix:
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    def _check_listening(self) -> None:
        if self.processes > 1 and self.is_unix:
            # The system shares a port among the sockets that listen on it, but no unix socket (SO_REUSEPORT). One
            # socket for all would have to be handed to gRPC, which for Python takes neither one that listens nor one
            # that is connected; and to pass on the bytes would cost as much CPU time as gRPC itself.
            raise ConfigError(
                f"--processes is {self.processes}, but --host is a unix socket, which the system does not share among "
                "processes as it does a port, and gRPC cannot take one over; give --host 127.0.0.1 and --token-file, "
                f"or start {self.processes} servers of one process with a path each"
            )
        if self.processes > 1 and sys.platform != "linux":
            raise ConfigError(f"--processes is {self.processes}, but only Linux shares a port fairly; leave it out")
        if self.http_port >= 0 and self.is_unix:
            raise ConfigError("--http-port is given, but --host is a unix socket; give --host an address")
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
