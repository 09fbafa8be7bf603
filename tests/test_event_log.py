"""Agreement: TensorBoard itself reads what the log writes."""

import math
import struct
from pathlib import Path

import pytest

from hwnas.errors import HwnasError
from hwnas.event_log import EventLog, _masked_sum, _varint


def read_back(folder: Path):
    """The scalars of a folder by name, `[(step, value)]`, as TensorBoard reads them."""
    accumulators = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    accumulator = accumulators.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        name: [(event.step, event.value) for event in accumulator.Scalars(name)]
        for name in accumulator.Tags()["scalars"]
    }


def test_tensorboard_reads_every_scalar_back(tmp_path: Path):
    with EventLog(tmp_path / "logs", 1) as log:
        for step in range(1, 301):
            log.scalars(step, {"loss": 1 / step, "accuracy/smallest": 0.5})
    found = read_back(tmp_path / "logs")
    assert set(found) == {"loss", "accuracy/smallest"}
    assert [step for step, _ in found["loss"]] == list(range(1, 301))
    for step, value in found["loss"]:
        assert value == struct.unpack("<f", struct.pack("<f", 1 / step))[0]


def test_steps_that_are_done_again_after_a_kill_stand_in_the_curve_once(tmp_path: Path):
    killed = EventLog(tmp_path, 1)
    for step in range(1, 9):
        killed.scalars(step, {"loss": float(step)})
    killed.file.flush()
    with EventLog(tmp_path, 6) as log:
        for step in range(6, 11):
            log.scalars(step, {"loss": 10.0 * step})
    assert read_back(tmp_path)["loss"] == [(s, s if s < 6 else 10 * s) for s in range(1, 11)]


def test_a_loss_that_is_no_number_is_written_as_such(tmp_path: Path):
    with EventLog(tmp_path, 1) as log:
        log.scalars(1, {"loss": math.nan})
    ((step, value),) = read_back(tmp_path)["loss"]
    assert step == 1
    assert math.isnan(value)


def test_the_check_sums_are_those_of_the_published_example():
    assert struct.unpack("<I", _masked_sum(b"123456789"))[0] == _masked(0xE3069283)  # RFC 3720, appendix B.4
    assert struct.unpack("<I", _masked_sum(bytes(32)))[0] == _masked(0x8A9136AA)


def _masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.mark.parametrize(("value", "expected"), [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02")])
def test_whole_numbers_are_written_seven_bits_a_byte(value: int, expected: str):
    assert _varint(value).hex() == expected  # 300: the example of the format's documentation


def test_a_log_that_cannot_be_written_is_one_clear_message(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HwnasError, match=r"The log .* could not be written: .*another --runs"):
        EventLog(tmp_path / "file" / "logs", 1)
