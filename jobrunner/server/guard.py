"""The one place where what a handler raises becomes a gRPC status."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Protocol, cast

from grpclib.const import Status
from grpclib.exceptions import GRPCError
from grpclib.server import Stream
from h2.exceptions import ProtocolError as H2Error

from jobrunner.errors import InternalError, InvalidRequest, JobRunnerError, LimitReached, Unsupported
from jobrunner.wire.codec import MalformedMessage, TooManyFields
from jobrunner.wire.status import error_to_wire

if TYPE_CHECKING:
    from jobrunner.server.stream import ServerStream

__all__ = ["grpc_error", "guarded", "refused"]

logger = logging.getLogger(__name__)


class Handler(Protocol):
    """What grpclib calls for an RPC."""

    def __call__(self, stream: Stream[Any, Any]) -> Coroutine[Any, Any, None]: ...


def guarded(handler: Handler, method: str, met: Callable[[str], None]) -> Handler:
    """The handler, with every error that it raises answered in the words of `wire.status`; what is a bug is logged too.

    `met` is called with the name of a bound that the call has met.
    """

    async def answer(stream: Stream[Any, Any]) -> None:
        try:
            await handler(stream)
        except GRPCError:
            raise
        except H2Error as exc:  # the peer reset the stream while it was written to
            raise GRPCError(Status.CANCELLED, "the stream is closed") from exc
        except Exception as exc:
            error = _known(exc, method)
            if isinstance(error, LimitReached):
                met(error.bound)
            await refused(error)(stream)

    return answer


def refused(error: JobRunnerError) -> Handler:
    """A handler that answers with this error, its trailer included."""

    async def answer(stream: Stream[Any, Any]) -> None:
        wire = error_to_wire(error)
        if isinstance(error, LimitReached):
            cast("ServerStream", stream._stream).pushback = error.retry_after
        await stream.send_trailing_metadata(status=wire.status, status_message=wire.message, metadata=wire.trailer)

    return answer


def grpc_error(error: JobRunnerError) -> GRPCError:
    """The same answer where there is no stream yet to send the trailer on."""
    wire = error_to_wire(error)
    return GRPCError(wire.status, wire.message)


def _known(exc: Exception, method: str) -> JobRunnerError:
    """What went wrong in this project's words. Task groups wrap; of several errors the first counts, the others are logged."""
    call = method.rpartition("/")[2]
    while isinstance(exc, ExceptionGroup):
        for other in exc.exceptions[1:]:
            logger.error("another error in %s", method, exc_info=other)
        exc = exc.exceptions[0]
    match exc:
        case InternalError():
            logger.error("internal error in %s", method, exc_info=exc)
            return exc
        case JobRunnerError():
            return exc
        case TooManyFields():
            return LimitReached(f"call {call}", "max_fields", str(exc))
        case MalformedMessage():
            return InvalidRequest("message", str(exc), verb=f"call {call}")
        case NotImplementedError() if "ompression" in str(exc):
            return Unsupported(f"cannot call {call}: compressed messages are not supported")
    logger.error("internal error in %s", method, exc_info=exc)
    return InternalError(f"cannot call {call}: internal error: {type(exc).__name__}")
