"""Writes scalars as TensorBoard reads them: `tensorboard --logdir runs` shows how a training goes.

An event file is a sequence of records (TFRecord: the length as 8 bytes, its check sum, the data, its check sum), each a
protocol buffer message `Event` (tensorflow/core/util/event.proto). The few fields that scalars need are written here by
hand, so that no library is needed for it.

Each process writes a file of its own. It begins with a start event, by which readers forget what an earlier, killed
process wrote of the steps that are done again.
"""

import socket
import struct
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import TracebackType

from hwnas.errors import HwnasError

POLYNOMIAL, MASK = 0x82F63B78, 0xA282EAD8
"""Of CRC-32C (Castagnoli), bits reversed; and what TFRecord adds after it has turned the sum by 15 bits."""
VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5
"""Wire types of protocol buffers."""
FLUSH_SECONDS = 5.0


class EventLog:
    """A file of scalars in `folder`, closed when the `with` block ends.

    Args:
        folder: what `tensorboard --logdir` is given, or one in it.
        first_step: the first step that will be written; what other files of the folder say of it and of later ones
            no longer counts.

    Raises:
        HwnasError: the file cannot be written.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self.path = folder / f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.hwnas"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("xb")
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self.flushed = time.monotonic()
        self._write(_event(0, _bytes_field(3, b"brain.Event:2")))
        self._write(_event(first_step, _bytes_field(7, _key(1, VARINT) + _varint(1))))

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.file.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes values by name, such as `loss`, of one step."""
        summary = b"".join(
            _bytes_field(1, _bytes_field(1, name.encode()) + _key(2, FIXED_32) + struct.pack("<f", value))
            for name, value in values.items()
        )
        self._write(_event(step, _bytes_field(5, summary)))

    def _write(self, event: bytes) -> None:
        try:
            self.file.write(_record(event))
            if (now := time.monotonic()) - self.flushed > FLUSH_SECONDS:
                self.file.flush()
                self.flushed = now
        except OSError as error:
            raise _unwritable(self.path, error) from None


def _unwritable(path: Path, error: OSError) -> HwnasError:
    return HwnasError(f"The log {path} could not be written: {error}. Free some space, or give another --runs.")


# ---- protocol buffers --------------------------------------------------------------------------------------------


def _varint(value: int) -> bytes:
    """A whole number, seven bits a byte, the lowest first; all bytes but the last have the highest bit set."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*parts, value])


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _bytes_field(field: int, content: bytes) -> bytes:
    return _key(field, BYTES) + _varint(len(content)) + content


def _event(step: int, content: bytes) -> bytes:
    """An `Event`: wall time (1), step (2), and one more field."""
    return _key(1, FIXED_64) + struct.pack("<d", time.time()) + _key(2, VARINT) + _varint(step) + content


# ---- records -----------------------------------------------------------------------------------------------------


def _record(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    return length + _masked_sum(length) + content + _masked_sum(content)


def _masked_sum(content: bytes) -> bytes:
    found = 0xFFFFFFFF
    for byte in content:
        found = _table()[(found ^ byte) & 0xFF] ^ found >> 8
    found ^= 0xFFFFFFFF
    return struct.pack("<I", ((found >> 15 | found << 17) + MASK) & 0xFFFFFFFF)


@cache
def _table() -> tuple[int, ...]:
    """CRC-32C of each byte."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)
