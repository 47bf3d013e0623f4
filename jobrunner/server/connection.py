"""HTTP/2 as the server speaks it: h2's connection with what it lacks against a hostile peer.

h2 keeps what a peer sends in more places than one would think: each setting that it does not know, how each of the last 65,536
streams ended, a header block as long as 64 frames, and a table of the headers it has sent, as long as the peer wishes. Here all of
these are small. What may be told call by call (too many streams, headers too long) is left to `http2`.

What RFC 9113 calls an error of a stream ends that stream alone, also where h2 would end the connection. One is left to h2: a DATA
frame that is too long, for to skip it one would have to read it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Any

from h2.config import H2Configuration
from h2.connection import ConnectionInputs, H2Connection
from h2.errors import ErrorCodes
from h2.events import StreamReset
from h2.exceptions import DenialOfServiceError, FlowControlError, InvalidBodyLengthError, ProtocolError
from h2.settings import SettingCodes, Settings
from h2.stream import StreamClosedBy, StreamInputs
from h2.utilities import HeaderValidationFlags, validate_headers
from hpack.exceptions import HPACKError
from hyperframe.frame import DataFrame, Frame, HeadersFrame, PriorityFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame

from jobrunner.server.frames import BrokenFrame, Frames, TooMuch

__all__ = ["Http2", "checked_headers"]

HEADER_TABLE = 4096
"""Bytes of headers that are remembered to be sent shorter, whatever more a peer allows (RFC 7541 section 4.2)."""
LAST_SETTING = max(SettingCodes)
DATA_HEAD = struct.Struct(">HBBBL")
"""Length in 24 bits, type, flags, stream (RFC 9113 section 4.1)."""


def checked_headers(headers: Iterable[Any], *, trailers: bool = False) -> list[tuple[str, str]]:
    """What h2 has decoded, as text. Raises ProtocolError where RFC 9113 calls a request malformed (sections 8.2 and 8.3).

    That is an error of the stream; h2, asked to look at it itself, would end the connection.
    """
    flags = HeaderValidationFlags(is_client=False, is_trailer=trailers, is_response_header=False, is_push_promise=False)
    try:
        return [(name.decode("ascii"), value.decode("ascii")) for name, value in validate_headers(headers, flags)]
    except UnicodeDecodeError as exc:
        raise ProtocolError("a header is not ASCII") from exc


class Http2(H2Connection):
    """The server's end of one connection."""

    MAX_CLOSED_STREAMS = 1024

    def __init__(self, config: H2Configuration, *, max_streams: int, max_header_size: int, stream_window: int) -> None:
        """Sizes in bytes. A header list of four times `max_header_size` ends the connection: its decoding is given up."""
        super().__init__(config)
        self.local_settings = Settings(
            client=False,
            initial_values={
                SettingCodes.MAX_CONCURRENT_STREAMS: max_streams,
                SettingCodes.MAX_HEADER_LIST_SIZE: max_header_size,
                SettingCodes.INITIAL_WINDOW_SIZE: stream_window,
            },
        )
        self.incoming_buffer = Frames(server=True)
        self.max_header_block = 4 * max_header_size
        self.decoder.max_header_list_size = self.max_header_block

    @property
    def open_inbound_streams(self) -> int:
        """h2 asks before each stream, and would end the connection of who opens too many; `http2` refuses them one by one."""
        _ = super().open_inbound_streams  # forgets those that are closed
        return 0

    def credit(self, stream_id: int) -> int:
        """Bytes that the peer takes of this stream, whatever its window of all of them is. Raises ProtocolError if it is closed."""
        return int(self._get_stream_by_id(stream_id).outbound_flow_control_window)

    def data_head(self, stream_id: int, size: int) -> bytes:
        """As `send_data` of so many bytes without any flag, which fit into the window and one frame: what goes before them.

        h2 would copy them three times.
        """
        self.state_machine.process_input(ConnectionInputs.SEND_DATA)
        stream = self.streams[stream_id]
        stream.state_machine.process_input(StreamInputs.SEND_DATA)
        self.outbound_flow_control_window -= size
        stream.outbound_flow_control_window -= size
        return DATA_HEAD.pack(size >> 8, size & 0xFF, DataFrame.type, 0, stream_id)

    def receive_data(self, data: Any) -> list[Any]:
        events = super().receive_data(data)
        if sum(len(frame.data) for frame in self.incoming_buffer._headers_buffer) > self.max_header_block:
            raise TooMuch(f"a header block is longer than {self.max_header_block} bytes", "max_header_size")
        return events

    def _receive_frame(self, frame: Frame) -> list[Any]:
        if isinstance(frame, BrokenFrame):
            if self._is_idle(frame.stream_id):
                raise ProtocolError(f"a frame on stream {frame.stream_id}, which is idle, is broken")
            return self._end_stream(frame.stream_id, frame.code)
        if isinstance(frame, SettingsFrame):
            # Those that are not known are ignored (section 6.5.2), where h2 would keep them.
            frame.settings = {code: value for code, value in frame.settings.items() if code <= LAST_SETTING}
            if SettingCodes.HEADER_TABLE_SIZE in frame.settings:
                frame.settings[SettingCodes.HEADER_TABLE_SIZE] = min(frame.settings[SettingCodes.HEADER_TABLE_SIZE], HEADER_TABLE)
        elif isinstance(frame, RstStreamFrame | WindowUpdateFrame) and self._is_idle(frame.stream_id):
            raise ProtocolError(f"stream {frame.stream_id} is idle")  # sections 5.1 and 6.4; h2 ignores a reset
        elif isinstance(frame, HeadersFrame | PriorityFrame) and frame.depends_on == frame.stream_id:
            frame.depends_on = 0  # priorities say nothing any more (section 5.3.2)
        return super()._receive_frame(frame)

    def _receive_headers_frame(self, frame: HeadersFrame) -> Any:
        try:
            return super()._receive_headers_frame(frame)
        except DenialOfServiceError as exc:
            raise TooMuch(f"a list of headers is longer than {self.max_header_block} bytes", "max_header_size") from exc
        except ProtocolError as exc:
            if isinstance(exc.__cause__, HPACKError):
                exc.error_code = ErrorCodes.COMPRESSION_ERROR  # section 4.3
            elif type(exc) in (ProtocolError, InvalidBodyLengthError) and frame.stream_id in self.streams:
                # The stream has refused them; they have been decoded, so that the tables of both sides still agree.
                return [], self._end_stream(frame.stream_id, ErrorCodes.PROTOCOL_ERROR)
            raise

    def _receive_data_frame(self, frame: DataFrame) -> Any:
        size = frame.flow_controlled_length
        fits = size <= self._inbound_flow_control_window_manager.current_window_size
        try:
            return super()._receive_data_frame(frame)
        except (InvalidBodyLengthError, FlowControlError) as exc:
            if not fits:  # the window of the connection
                raise
            events = self._end_stream(frame.stream_id, exc.error_code)
            frames = []
            if given_back := self._inbound_flow_control_window_manager.process_bytes(size):
                frames.append(WindowUpdateFrame(0, window_increment=given_back))
            return frames, events

    def _end_stream(self, stream_id: int, code: ErrorCodes) -> list[Any]:
        """Tell the peer that this stream is over for an error of its own, and whoever handles it."""
        reset = RstStreamFrame(stream_id)
        reset.error_code = code
        self._prepare_for_sending([reset])
        stream = self.streams.get(stream_id)
        if stream is None:
            return []
        stream.reset_stream(code)
        stream.state_machine.stream_closed_by = StreamClosedBy.SEND_RST_STREAM
        return [StreamReset(stream_id=stream_id, error_code=code, remote_reset=False)]

    def _terminate_connection(self, error_code: ErrorCodes) -> None:
        """`receive_data` raises; whoever catches it sends GOAWAY, with the reason."""

    def _acknowledge_settings(self) -> list[Frame]:
        frames = super()._acknowledge_settings()
        changes = self.encoder.table_size_changes
        if len(changes) > 2:  # the smallest and the last are told with the next headers (RFC 7541 section 4.2)
            self.encoder.table_size_changes = [min(changes), changes[-1]]
        return frames

    def _is_idle(self, stream_id: int) -> bool:
        return stream_id > self.highest_inbound_stream_id if stream_id % 2 else stream_id > self.highest_outbound_stream_id
