"""Official protobuf for the tests: the message classes of this repository's protos, compiled when they are asked for."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor
    from google.protobuf.message import Message

PROTOS = Path(__file__).resolve().parents[2] / "protos"
NAMES = ("jobrunner/v1/jobs.proto", "grpc/health/v1/health.proto", "grpc/reflection/v1/reflection.proto")


@cache
def official() -> dict[str, type[Message]]:
    """Every message type of protos/ and of what they import, by its full name; map entries are left out."""
    with TemporaryDirectory() as directory:
        out = Path(directory) / "set"
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", f"--descriptor_set_out={out}", "--include_imports"]
        subprocess.run([*command, *NAMES], check=True)
        files = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    names = [f"{file.package}.{message.name}" for file in files.file for message in file.message_type]
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names}


def filled(cls: type[Message], only: str = "") -> Message:
    """A message with a value other than the default in every field, or only in the field of this name, and so on inward."""
    message = cls()
    for field in cls.DESCRIPTOR.fields:
        if not only or field.name == only:
            _fill(message, field)
    return message


def _fill(message: Message, field: Any) -> None:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        getattr(message, field.name)["key"] = "value"
    elif field.message_type is not None:
        target = getattr(message, field.name)
        (target.add() if field.is_repeated else target).CopyFrom(filled(_class_of(field.message_type)))
    elif field.is_repeated:
        getattr(message, field.name).extend([_scalar(field), _scalar(field)])
    else:
        setattr(message, field.name, _scalar(field))


def _class_of(descriptor: Descriptor) -> type[Message]:
    return message_factory.GetMessageClass(descriptor)


def _scalar(field: Any) -> object:
    if field.containing_type.full_name.startswith("google.protobuf.") and field.name == "nanos":
        return 123_456_000  # betterproto2 holds microseconds
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    return {
        field.CPPTYPE_STRING: b"\xff\x00raw" if field.type == field.TYPE_BYTES else "snö☃",
        field.CPPTYPE_BOOL: True,
        field.CPPTYPE_DOUBLE: 1.5,
        field.CPPTYPE_INT32: -7,
        field.CPPTYPE_INT64: 1_700_000_000,
        field.CPPTYPE_UINT32: 1 << 31,
        field.CPPTYPE_UINT64: (1 << 62) + 5,
    }[field.cpp_type]
