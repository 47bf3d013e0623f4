"""HTTP/2 as the server speaks it: h2's connection with what it lacks against a hostile peer, and a count of frames before it.

h2 keeps what a peer sends in more places than one would think: each setting that it does not know, how each of the last 65,536
streams ended, a header block as long as 64 frames, and a table of the headers it has sent, as long as the peer wishes. Here all of
these are small. What may be told call by call (too many streams, headers too long) is left to `http2`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import DenialOfServiceError, FrameTooLargeError, ProtocolError
from h2.settings import SettingCodes, Settings
from h2.utilities import HeaderValidationFlags, validate_headers
from hpack.exceptions import HPACKError
from hyperframe.frame import Frame, HeadersFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame

__all__ = ["FrameMeter", "Http2", "TooMuch", "checked_headers"]

PREFACE = 24
"""Bytes of the client's connection preface (RFC 9113 section 3.4)."""
CRUMB = 256
"""Bytes of DATA below which a frame counts as one that is sent for its own sake."""
HEADER_TABLE = 4096
"""Bytes of headers that are remembered to be sent shorter, whatever more a peer allows (RFC 7541 section 4.2)."""
LAST_SETTING = max(SettingCodes)
SETTINGS, ACK = 4, 1


def checked_headers(headers: Iterable[Any], *, trailers: bool = False) -> list[tuple[str, str]]:
    """What h2 has decoded, as text. Raises ProtocolError where RFC 9113 calls a request malformed (sections 8.2 and 8.3).

    That is an error of the stream; h2, asked to look at it itself, would end the connection.
    """
    flags = HeaderValidationFlags(is_client=False, is_trailer=trailers, is_response_header=False, is_push_promise=False)
    try:
        return [(name.decode("ascii"), value.decode("ascii")) for name, value in validate_headers(headers, flags)]
    except UnicodeDecodeError as exc:
        raise ProtocolError("a header is not ASCII") from exc


class TooMuch(ProtocolError):
    """The peer does something more often, or longer, than it may. The text goes to it, and names the bound."""

    error_code = ErrorCodes.ENHANCE_YOUR_CALM


class FrameMeter:
    """Counts the frames of a connection whose handling costs more than sending them: all but DATA that carries something."""

    def __init__(self, max_frame: int) -> None:
        """`max_frame` is the length in bytes of a payload that the peer has been told of."""
        self._max_frame = max_frame
        self._head = b""
        self._payload = PREFACE

    def count(self, data: bytes) -> int:
        """How many begin in this piece of what the peer sends. Raises ProtocolError for one too long, before it is there."""
        data = self._head + data if self._head else data
        at, found = self._payload, 0
        while at + 9 <= len(data):
            length = int.from_bytes(data[at : at + 3], "big")
            if length > self._max_frame:
                raise FrameTooLargeError(f"a frame of {length} bytes is longer than {self._max_frame} (SETTINGS_MAX_FRAME_SIZE)")
            if data[at + 3] == SETTINGS and data[at + 4] & ACK and length:
                raise FrameTooLargeError("an acknowledgement of SETTINGS has a payload")  # h2 would say PROTOCOL_ERROR
            found += data[at + 3] != 0 or length < CRUMB
            at += 9 + length
        self._head, self._payload = (data[at:], 0) if at < len(data) else (b"", at - len(data))
        return found


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
        self.max_header_block = 4 * max_header_size
        self.decoder.max_header_list_size = self.max_header_block

    @property
    def open_inbound_streams(self) -> int:
        """h2 asks before each stream, and would end the connection of who opens too many; `http2` refuses them one by one."""
        _ = super().open_inbound_streams  # forgets those that are closed
        return 0

    def receive_data(self, data: Any) -> list[Any]:
        events = super().receive_data(data)
        if sum(len(frame.data) for frame in self.incoming_buffer._headers_buffer) > self.max_header_block:
            raise TooMuch(f"a header block is longer than {self.max_header_block} bytes (max_header_size)")
        return events

    def _receive_frame(self, frame: Frame) -> list[Any]:
        if isinstance(frame, SettingsFrame):
            # Those that are not known are ignored (section 6.5.2), where h2 would keep them.
            frame.settings = {code: value for code, value in frame.settings.items() if code <= LAST_SETTING}
            if SettingCodes.HEADER_TABLE_SIZE in frame.settings:
                frame.settings[SettingCodes.HEADER_TABLE_SIZE] = min(frame.settings[SettingCodes.HEADER_TABLE_SIZE], HEADER_TABLE)
        elif isinstance(frame, RstStreamFrame | WindowUpdateFrame) and self._is_idle(frame.stream_id):
            raise ProtocolError(f"stream {frame.stream_id} is idle")  # sections 5.1 and 6.4; h2 ignores a reset
        return super()._receive_frame(frame)

    def _receive_headers_frame(self, frame: HeadersFrame) -> Any:
        try:
            return super()._receive_headers_frame(frame)
        except ProtocolError as exc:
            if isinstance(exc.__cause__, HPACKError) and not isinstance(exc, DenialOfServiceError):
                exc.error_code = ErrorCodes.COMPRESSION_ERROR  # section 4.3
            raise

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
