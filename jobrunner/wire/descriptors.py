"""The committed descriptors of the protocol, as server reflection hands them out.

`descriptors.binpb` is a FileDescriptorSet; only names are read from it here, so that no parser of descriptors is needed. Field
numbers are those of https://github.com/protocolbuffers/protobuf/blob/main/src/google/protobuf/descriptor.proto.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files

from jobrunner.wire.codec import payloads

__all__ = ["Descriptors", "load"]

FILES = 1
NAME, PACKAGE, DEPENDENCY, MESSAGE, ENUM, SERVICE = 1, 2, 3, 4, 5, 6
NESTED_MESSAGE, NESTED_ENUM = 3, 4
METHOD = 2


@dataclass(frozen=True, slots=True)
class Descriptors:
    """Serialized FileDescriptorProtos by path, and where each symbol is defined."""

    files: Mapping[str, bytes]
    dependencies: Mapping[str, tuple[str, ...]]
    symbols: Mapping[str, str]
    """Full name of a message, enum, service or method, to the path of its file."""
    services: tuple[str, ...]

    def closure(self, path: str) -> list[bytes]:
        """The file and everything it imports, itself first."""
        paths = [path]
        for known in paths:  # grows while it is walked
            paths += [name for name in self.dependencies[known] if name not in paths]
        return [self.files[known] for known in paths]


def load() -> Descriptors:
    """Read the committed set."""
    raw = (files("jobrunner.wire") / "descriptors.binpb").read_bytes()
    found = {_name(data): data for number, data in payloads(raw) if number == FILES}
    dependencies = {
        path: tuple(part.decode() for number, part in payloads(data) if number == DEPENDENCY) for path, data in found.items()
    }
    symbols = {symbol: path for path, data in found.items() for symbol in _symbols(data)}
    services = sorted(
        f"{_package(data)}{_name(part)}" for data in found.values() for number, part in payloads(data) if number == SERVICE
    )
    return Descriptors(found, dependencies, symbols, tuple(services))


def _name(data: bytes) -> str:
    return next(part.decode() for number, part in payloads(data) if number == NAME)


def _package(data: bytes) -> str:
    return next((f"{part.decode()}." for number, part in payloads(data) if number == PACKAGE), "")


def _symbols(file: bytes) -> Iterator[str]:
    package = _package(file)
    for number, part in payloads(file):
        if number in (ENUM, SERVICE):
            yield f"{package}{_name(part)}"
        if number == MESSAGE:
            yield from _message_symbols(package, part)
        if number == SERVICE:
            yield from (f"{package}{_name(part)}.{_name(method)}" for inner, method in payloads(part) if inner == METHOD)


def _message_symbols(scope: str, message: bytes) -> Iterator[str]:
    name = f"{scope}{_name(message)}"
    yield name
    for number, part in payloads(message):
        if number == NESTED_ENUM:
            yield f"{name}.{_name(part)}"
        if number == NESTED_MESSAGE:
            yield from _message_symbols(f"{name}.", part)
