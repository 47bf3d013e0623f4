"""The standard server reflection, from the committed descriptors: https://github.com/grpc/grpc/blob/master/doc/server-reflection.md"""

from __future__ import annotations

from collections.abc import AsyncIterator

from grpclib.const import Handler, Status

from jobrunner.wire import messages as pb
from jobrunner.wire.descriptors import Descriptors

__all__ = ["ReflectionService"]

V1 = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
V1ALPHA = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"


class ReflectionService(pb.ServerReflectionBase):
    """Answers each question in turn; what it does not have is an error in the answer, not of the call."""

    def __init__(self, descriptors: Descriptors) -> None:
        self._descriptors = descriptors

    def __mapping__(self) -> dict[str, Handler]:
        mapping: dict[str, Handler] = super().__mapping__()
        return mapping | {V1ALPHA: mapping[V1]}

    async def server_reflection_info(
        self, messages: AsyncIterator[pb.ServerReflectionRequest]
    ) -> AsyncIterator[pb.ServerReflectionResponse]:
        async for request in messages:
            answer = self._answer(request)
            answer.valid_host = request.host
            answer.original_request = request
            yield answer

    def _answer(self, request: pb.ServerReflectionRequest) -> pb.ServerReflectionResponse:
        known = self._descriptors
        if request.list_services is not None:
            services = [pb.ServiceResponse(name=name) for name in known.services]
            return pb.ServerReflectionResponse(list_services_response=pb.ListServiceResponse(service=services))
        if request.file_by_filename is not None:
            return self._file(request.file_by_filename, request.file_by_filename)
        if request.file_containing_symbol is not None:
            return self._file(known.symbols.get(request.file_containing_symbol, ""), request.file_containing_symbol)
        if (extended := request.all_extension_numbers_of_type) is not None and extended in known.symbols:
            numbers = pb.ExtensionNumberResponse(base_type_name=extended)
            return pb.ServerReflectionResponse(all_extension_numbers_response=numbers)
        if request.file_containing_extension is not None or request.all_extension_numbers_of_type is not None:
            return _error(Status.NOT_FOUND, "there is no such type or extension")
        return _error(Status.INVALID_ARGUMENT, "there is no question in the request")

    def _file(self, path: str, asked: str) -> pb.ServerReflectionResponse:
        if path not in self._descriptors.files:
            return _error(Status.NOT_FOUND, f'"{asked}" is not known')
        found = pb.FileDescriptorResponse(file_descriptor_proto=self._descriptors.closure(path))
        return pb.ServerReflectionResponse(file_descriptor_response=found)


def _error(status: Status, message: str) -> pb.ServerReflectionResponse:
    return pb.ServerReflectionResponse(error_response=pb.ErrorResponse(error_code=status.value, error_message=message))
