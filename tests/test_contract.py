"""Laws that span files: names, both clients alike, codes and exceptions, imports, the contract itself, the README."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support import ROOT, Server

import layertap
from layertap import AsyncClient, Client, LayertapError, StatusCode, errors, wire
from layertap._transport.settings import DEFAULT_TIMEOUT_S
from layertap.errors import from_status
from layertap.v1 import embedding_pb2 as pb
from layertap.v1 import embedding_pb2_grpc
from layertap_server.compat import open_inference_pb2

BUF = Path(sysconfig.get_path("scripts")) / "buf"
SERVICE = "layertap.v1.EmbeddingService"

# Names.


def test_all_is_sorted_and_complete() -> None:
    names = {
        name
        for name, value in vars(layertap).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert list(layertap.__all__) == sorted(layertap.__all__, key=lambda name: (not name.isupper(), name))
    assert set(layertap.__all__) == names | {"__version__"}


@pytest.mark.parametrize("name", layertap.__all__)
def test_what_is_exported_is_documented(name: str) -> None:
    value = getattr(layertap, name)
    assert name == "__version__" or (inspect.getdoc(value) or "").split("\n")[0].endswith(".")


def test_the_version_is_that_of_the_package() -> None:
    from importlib.metadata import version

    assert layertap.__version__ == version("layertap")


def test_the_oldest_versions_that_are_tested_are_those_that_the_package_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # The first line of each is that of the oldest Python.
    tested = dict(re.findall(r"^(\w+)==([\d.]+)", (ROOT / "tests/floors.txt").read_text(), re.MULTILINE)[::-1])
    for dependency in project["dependencies"]:
        name, floor = re.match(r"(\w+)>=([\d.]+)", dependency).groups()
        assert f"{tested.pop(name)}.".startswith(f"{floor}.")
    assert not tested


# Both clients alike.

METHODS = sorted(name for name in dir(Client) if callable(getattr(Client, name)) and not name.startswith("_"))
CALLS = [name for name in METHODS if name != "from_channel"]


def test_both_clients_have_the_same_methods() -> None:
    methods = (name for name in dir(AsyncClient) if callable(getattr(AsyncClient, name)))
    assert sorted(name for name in methods if not name.startswith("_")) == METHODS
    assert {"tokenize", "decode", "embed", "embed_layers", "embed_stream", "model_info", "close"} <= set(METHODS)


@pytest.mark.parametrize("name", ["__init__", *METHODS])
def test_both_clients_take_the_same_arguments(name: str) -> None:
    sync = inspect.signature(getattr(Client, name)).parameters
    awaited = inspect.signature(getattr(AsyncClient, name)).parameters
    assert list(sync) == list(awaited)
    for one, other in zip(sync.values(), awaited.values(), strict=True):
        assert (one.kind, one.default) == (other.kind, other.default)
        if one.name != "inputs":
            assert one.annotation == str(other.annotation).replace("grpc.aio.", "grpc.") or one.name == "self"


@pytest.mark.parametrize("name", METHODS)
def test_arguments_after_the_first_are_keyword_only_and_have_defaults(name: str) -> None:
    for one in list(inspect.signature(getattr(Client, name)).parameters.values())[2:]:
        # The encode methods have the order of sentence-transformers.
        kinds = {inspect.Parameter.KEYWORD_ONLY} | (
            {inspect.Parameter.POSITIONAL_OR_KEYWORD} if name.startswith("encode") else set()
        )
        named = one.kind in kinds and one.default is not inspect.Parameter.empty
        assert named or (one.kind is inspect.Parameter.VAR_KEYWORD and one.annotation.startswith("Unpack["))


@pytest.mark.parametrize("name", CALLS)
def test_both_clients_return_the_same_but_for_waiting(name: str) -> None:
    sync = inspect.signature(getattr(Client, name)).return_annotation
    awaited = inspect.signature(getattr(AsyncClient, name)).return_annotation
    assert re.sub(r"Async(Generator\[\w+, None)", r"\1, None", awaited) == sync
    method = getattr(AsyncClient, name)
    assert awaited.startswith("AsyncGenerator") != inspect.iscoroutinefunction(method)
    assert not inspect.isasyncgenfunction(method), "it would check its arguments only when it is iterated"


@pytest.mark.parametrize("name", CALLS)
def test_deadlines_are_the_clients_where_a_call_names_none(name: str) -> None:
    for one in inspect.signature(getattr(Client, name)).parameters.values():
        assert not one.name.endswith("timeout_s") or one.default is None
    assert 0 < DEFAULT_TIMEOUT_S < 3600


@pytest.mark.parametrize(
    ("literal", "names"),
    [
        (layertap.types.DtypeName, wire.DTYPES),
        (layertap.types.TruncationName, wire.TRUNCATIONS),
        (layertap.types.PoolingName, wire.POOLING_STRATEGIES),
        (layertap.types.WordPoolingName, wire.WORD_POOLINGS),
        (layertap.types.MixName, wire.MIX_STRATEGIES),
        (layertap.quantization.Precision, layertap.quantization.PRECISIONS),
    ],
)
def test_the_names_that_type_checkers_know_are_those_that_are_taken(literal: Any, names: Any) -> None:
    assert set(typing.get_args(literal)) == set(names)


# Codes and exceptions.


def test_every_status_code_but_ok_has_an_exception_of_its_own() -> None:
    codes = {code.name: code.value[0] for code in grpc.StatusCode if code is not grpc.StatusCode.OK}
    assert {code.name: int(code) for code in StatusCode} == codes
    kinds = LayertapError.__subclasses__()
    assert sorted(kind.code for kind in kinds) == sorted(StatusCode)
    for kind in kinds:
        assert kind.__name__ == "".join(part.capitalize() for part in kind.code.name.split("_")) + "Error"
        assert getattr(layertap, kind.__name__) is kind
        assert type(from_status(int(kind.code), "x")) is kind
    assert type(from_status(0, "x")) is type(from_status(99, "x")) is layertap.UnknownError


def test_the_table_of_errors_has_every_exception_with_its_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([A-Z_]+) \| (.+) \|$", errors.__doc__ or "", re.MULTILINE)
    assert [(name, code) for name, code, _ in rows] == [
        (kind.__name__, kind.code.name) for kind in sorted(LayertapError.__subclasses__(), key=lambda kind: kind.code)
    ]
    assert all(reason.strip() for _, _, reason in rows)


# Imports.


def fresh(code: str) -> Any:
    """Runs code in a process of its own, without what measures coverage; returns what it prints, as JSON."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_layertap_loads_numpy_and_protobuf_alone_and_nothing_slow_and_has_no_effects() -> None:
    found = fresh("""
        import sys
        first = set(sys.modules)  # What the environment itself loads, by files that pip puts beside packages.
        import json, logging, os, signal, threading
        import numpy, google.protobuf.message
        before = dict(os.environ), len(os.listdir("/proc/self/task")), signal.getsignal(signal.SIGTERM)
        import layertap
        after = dict(os.environ), len(os.listdir("/proc/self/task")), signal.getsignal(signal.SIGTERM)
        print(json.dumps({
            "modules": sorted({name.split(".")[0] for name in sys.modules}),
            "foreign": sorted({name.split(".")[0] for name in set(sys.modules) - first} - sys.stdlib_module_names),
            "unchanged": before == after,
            "threads": [thread.name for thread in threading.enumerate()],
            "handlers": len(logging.getLogger().handlers) + len(logging.getLogger("layertap").handlers),
        }))
    """)
    # Not even grpc: importing it reads the environment, and is for the first call.
    assert found["foreign"] == ["google", "layertap", "numpy"]
    slow = {"argparse", "asyncio", "http", "multiprocessing", "ssl", "subprocess", "urllib"}
    assert not slow.intersection(found["modules"])
    assert found["threads"] == ["MainThread"] and found["unchanged"] and found["handlers"] == 0


def test_making_a_client_connects_nowhere_and_starts_no_thread() -> None:
    found = fresh("""
        import json, os, threading
        import grpc, layertap
        before = len(os.listdir("/proc/self/task"))
        layertap.Client("nowhere.invalid:1"), layertap.AsyncClient("nowhere.invalid:1")
        print(json.dumps([threading.active_count(), len(os.listdir("/proc/self/task")) - before]))
    """)
    assert found == [1, 0]


@pytest.mark.parametrize("module", ["config", "cli", "scheduler.batcher", "types"])
def test_parts_of_the_server_that_need_no_torch_load_none(module: str) -> None:
    found = fresh(f"""
        import json, sys
        import layertap_server.{module}
        print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
    """)
    assert not {"torch", "transformers", "tokenizers"}.intersection(found)


def test_the_server_loads_protocols_of_other_projects_only_with_their_flags() -> None:
    found = fresh("""
        import json, sys
        import layertap_server.app.server, layertap_server.cli
        print(json.dumps([name for name in sys.modules if name.startswith(("layertap_server.compat", "uvicorn"))]))
    """)
    assert not found


# The contract.


def descriptors(message: Descriptor) -> Iterator[Descriptor]:
    yield message
    for nested in message.nested_types:
        yield from descriptors(nested)


MESSAGES = [one for top in pb.DESCRIPTOR.message_types_by_name.values() for one in descriptors(top)]
FIELDS = [field for message in MESSAGES for field in message.fields]
STREAMED = sorted(
    {
        method.output_type.name
        for method in pb.DESCRIPTOR.services_by_name["EmbeddingService"].methods
        if method.server_streaming
    }
)
INTEGERS = (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_INT64)


def named(fields: list[FieldDescriptor]) -> Any:
    return pytest.mark.parametrize("field", fields, ids=[field.full_name for field in fields])


def without_what_compilers_add(file: descriptor_pb2.FileDescriptorProto) -> descriptor_pb2.FileDescriptorProto:
    """Removes positions in the source and JSON names, which not every compiler writes."""

    def strip(message: descriptor_pb2.DescriptorProto) -> None:
        for field in message.field:
            field.ClearField("json_name")
        for nested in message.nested_type:
            strip(nested)

    file.ClearField("source_code_info")
    for message in file.message_type:
        strip(message)
    return file


@pytest.mark.parametrize("generated", [pb, open_inference_pb2], ids=lambda module: module.DESCRIPTOR.name)
def test_the_generated_code_is_that_of_the_proto_file(generated: Any) -> None:
    done = subprocess.run(
        [BUF, "build", "protos", "--as-file-descriptor-set", "--exclude-source-info", "-o", "-"],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    files = {file.name: file for file in descriptor_pb2.FileDescriptorSet.FromString(done.stdout).file}
    own = descriptor_pb2.FileDescriptorProto()
    generated.DESCRIPTOR.CopyToProto(own)
    assert without_what_compilers_add(own) == without_what_compilers_add(files[generated.DESCRIPTOR.name])


def test_the_generated_stub_and_types_have_every_rpc_and_message() -> None:
    service = pb.DESCRIPTOR.services_by_name["EmbeddingService"]
    assert [method.name for method in service.methods] == [
        "GetModelInfo",
        "Tokenize",
        "Decode",
        "Embed",
        "EmbedLayers",
        "EmbedStream",
        "ShareMemory",
    ]
    with grpc.insecure_channel("127.0.0.1:1") as channel:
        stub = embedding_pb2_grpc.EmbeddingServiceStub(channel)
        for method in service.methods:
            ways = (
                "Stream" if streaming else "Unary" for streaming in (method.client_streaming, method.server_streaming)
            )
            assert type(getattr(stub, method.name)).__name__.endswith("".join(ways) + "MultiCallable")
            assert hasattr(embedding_pb2_grpc.EmbeddingServiceServicer, method.name)
    typed = (ROOT / "client/layertap/v1/embedding_pb2.pyi").read_text()
    for message in MESSAGES:
        assert f"class {message.name}(" in typed
    for field in FIELDS:
        assert re.search(rf"\b{field.name}\b", typed)
    stubs = (ROOT / "client/layertap/v1/embedding_pb2_grpc.pyi").read_text()
    assert all(method.name in stubs for method in service.methods)


@named(FIELDS)
def test_fields_are_of_types_that_every_language_has(field: FieldDescriptor) -> None:
    assert field.type in (
        *INTEGERS,
        FieldDescriptor.TYPE_BOOL,
        FieldDescriptor.TYPE_FLOAT,
        FieldDescriptor.TYPE_STRING,
        FieldDescriptor.TYPE_BYTES,
        FieldDescriptor.TYPE_ENUM,
        FieldDescriptor.TYPE_MESSAGE,
    )


@named([field for field in FIELDS if field.is_repeated])
def test_lists_have_names_in_the_plural_or_those_of_transformers(field: FieldDescriptor) -> None:
    of_transformers = {"attention_mask", "special_tokens_mask", "offset_mapping"}
    one_each = {"shape", "truncated"}
    assert field.name.endswith("s") or field.name in of_transformers | one_each


@named([field for field in FIELDS if field.name.endswith(("_count", "_size", "_bytes", "_ns", "_index"))])
def test_quantities_are_single_integers_wide_enough(field: FieldDescriptor) -> None:
    assert field.type in INTEGERS and not field.is_repeated
    if field.name.endswith(("_bytes", "_ns")):
        assert field.type == FieldDescriptor.TYPE_INT64


@named([field for field in FIELDS if "time" in field.name.split("_")])
def test_times_say_their_unit(field: FieldDescriptor) -> None:
    assert field.name.endswith("_ns")


@pytest.mark.parametrize("name", pb.DESCRIPTOR.enum_types_by_name)
def test_the_zero_of_an_enum_is_unspecified_and_names_carry_that_of_the_enum(name: str) -> None:
    values = pb.DESCRIPTOR.enum_types_by_name[name].values
    prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper() + "_"
    assert values[0].number == 0 and values[0].name == prefix + "UNSPECIFIED"
    assert all(value.name.startswith(prefix) for value in values)
    assert not any(value.name.endswith("_UNSPECIFIED") for value in values[1:])


def test_both_streams_answer_with_messages_of_their_own() -> None:
    assert STREAMED == ["EmbedLayersResponse", "EmbedStreamResponse", "ShareMemoryResponse"]


@pytest.mark.parametrize("name", ["EmbedLayersResponse", "EmbedStreamResponse"])
def test_a_streamed_payload_is_the_last_field_and_in_no_oneof(name: str) -> None:
    message = pb.DESCRIPTOR.message_types_by_name[name]
    data = message.fields_by_name["data"]
    assert (data.number, data.type) == (15, FieldDescriptor.TYPE_BYTES)
    assert data.containing_oneof is None
    assert max(field.number for field in message.fields) == 15


def test_every_rpc_has_a_request_and_a_response_of_its_own() -> None:
    for method in pb.DESCRIPTOR.services_by_name["EmbeddingService"].methods:
        assert method.input_type.name == method.name + "Request"
        assert method.output_type.name == method.name + "Response"


# The standard services, on a real server.


def test_health_answers_for_the_server_and_for_the_service(tiny_server: Server) -> None:
    with grpc.insecure_channel(tiny_server.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="layertap.v1.NoSuchService"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_reflection_hands_out_the_contract(tiny_server: Server) -> None:
    with grpc.insecure_channel(tiny_server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert set(database.get_services()) == {
            SERVICE,
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        file = database.FindFileContainingSymbol(SERVICE)
        own = descriptor_pb2.FileDescriptorProto()
        pb.DESCRIPTOR.CopyToProto(own)
        assert without_what_compilers_add(file) == without_what_compilers_add(own)


def test_a_stock_client_speaks_with_the_server_by_reflection_alone(tiny_server: Server) -> None:
    request = {"inputs": [{"text": "I love Paris"}]}
    done = subprocess.run(
        [
            *(BUF, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "--data", json.dumps(request)),
            f"http://{tiny_server.address}/{SERVICE}/Tokenize",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"][0]["tokens"] == ["[CLS]", "i", "love", "paris", "[SEP]"]
