"""The messages of Envoy's external processing that the picker reads and writes.

Names and field numbers are those of ``envoy.service.ext_proc.v3``, of which this is a part: fields
that are not named here are skipped when a message is read. The classes are made from the table
below by protobuf's own runtime. Generated classes of all of Envoy's API can be had as packages, but
these also install ``google.api`` and ``opentelemetry`` over those of other packages.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import struct_pb2
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

METHOD = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
"""The one method of the service: a stream of requests, answered by a stream of responses."""

SKIPPED, STREAMED, BUFFERED, BUFFERED_PARTIAL, FULL_DUPLEX = range(5)
"""How Envoy sends bodies (``ProcessingMode.BodySendMode``)."""
OVERWRITE = 2
"""``HeaderValueOption.append_action``: set a header, whether it is there or not."""

PACKAGE = "pla_serve.ext_proc"
"""Package of the messages' names in this process; nothing on the wire names a message."""
STRUCT = "google.protobuf.Struct"
SCALARS = {
    "bool": FieldDescriptorProto.TYPE_BOOL,
    "bytes": FieldDescriptorProto.TYPE_BYTES,
    "int": FieldDescriptorProto.TYPE_INT32,
    "string": FieldDescriptorProto.TYPE_STRING,
}
TABLE = """
HeaderValue: key=1 string, value=2 string, raw_value=3 bytes
HeaderMap: headers=1 *HeaderValue
HttpHeaders: headers=1 HeaderMap, end_of_stream=3 bool
HttpBody: body=1 bytes, end_of_stream=2 bool
HttpTrailers: trailers=1 HeaderMap
Metadata: filter_metadata=1 *FilterMetadata
FilterMetadata: key=1 string, value=2 Struct
ProtocolConfiguration: request_body_mode=1 int, response_body_mode=2 int
ProcessingRequest: request_headers=2 |HttpHeaders, response_headers=3 |HttpHeaders, \
request_body=4 |HttpBody, response_body=5 |HttpBody, request_trailers=6 |HttpTrailers, \
response_trailers=7 |HttpTrailers, metadata_context=8 Metadata, \
protocol_config=11 ProtocolConfiguration
HeaderValueOption: header=1 HeaderValue, append_action=3 int
HeaderMutation: set_headers=1 *HeaderValueOption, remove_headers=2 *string
StreamedBodyResponse: body=1 bytes, end_of_stream=2 bool
BodyMutation: body=1 |bytes, clear_body=2 |bool, streamed_response=3 |StreamedBodyResponse
CommonResponse: status=1 int, header_mutation=2 HeaderMutation, body_mutation=3 BodyMutation, \
clear_route_cache=5 bool
HeadersResponse: response=1 CommonResponse
BodyResponse: response=1 CommonResponse
TrailersResponse: header_mutation=1 HeaderMutation
HttpStatus: code=1 int
ImmediateResponse: status=1 HttpStatus, headers=2 HeaderMutation, body=3 bytes, details=5 string
ProcessingResponse: request_headers=1 |HeadersResponse, response_headers=2 |HeadersResponse, \
request_body=3 |BodyResponse, response_body=4 |BodyResponse, request_trailers=5 |TrailersResponse, \
response_trailers=6 |TrailersResponse, immediate_response=7 |ImmediateResponse, \
dynamic_metadata=8 Struct
"""
"""One message a line. ``*`` marks a repeated field, ``|`` one of which at most one is set. A map is
a repeated message of key and value on the wire, and is declared as that."""


def _file() -> FileDescriptorProto:
    """Return the description of all messages of `TABLE`."""
    file = FileDescriptorProto(name="pla_serve/ext_proc.proto", package=PACKAGE, syntax="proto3")
    file.dependency.append("google/protobuf/struct.proto")
    for line in TABLE.strip().splitlines():
        name, _, fields = line.partition(": ")
        message = file.message_type.add(name=name)
        for text in fields.split(", "):
            declared, kind = text.split(" ")
            field_name, number = declared.split("=")
            field = message.field.add(name=field_name, number=int(number))
            field.label = FieldDescriptorProto.LABEL_OPTIONAL
            if kind.startswith("*"):
                field.label = FieldDescriptorProto.LABEL_REPEATED
            elif kind.startswith("|"):
                if not message.oneof_decl:
                    message.oneof_decl.add(name="kind")
                field.oneof_index = 0
            _set_type(field, kind.lstrip("*|"))
    return file


def _set_type(field: Any, kind: str) -> None:
    if kind in SCALARS:
        field.type = SCALARS[kind]
    else:
        field.type = FieldDescriptorProto.TYPE_MESSAGE
        field.type_name = f".{STRUCT}" if kind == "Struct" else f".{PACKAGE}.{kind}"


def _classes() -> tuple[Any, Any]:
    pool = DescriptorPool()
    structs = FileDescriptorProto()
    struct_pb2.DESCRIPTOR.CopyToProto(structs)
    pool.Add(structs)
    pool.Add(_file())
    requests = GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.ProcessingRequest"))
    responses = GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.ProcessingResponse"))
    return requests, responses


ProcessingRequest, ProcessingResponse = _classes()
"""Classes of the messages that Envoy sends, and of those that it is answered with."""
KIND = "kind"
"""Name by which both classes tell which of their alternative fields is set (``WhichOneof``)."""
