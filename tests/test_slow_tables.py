"""That a table which takes long is told of, and what takes less."""

from dataclasses import replace
from pathlib import Path

from simulated import SimulatedDevice, SimulatedMachine
from test_estimation import SPACE

from hwnas.latency import LatencyTable
from hwnas.profiling import profile
from hwnas.slow_tables import SLOW_S, Warned, known_table, warned


def notes_at(seconds_an_item: float, items: int) -> list[str]:
    """What is noted in a table of so many items that take so long each, by a scripted clock."""
    now, notes, seen = [0.0], list[str](), list[int]()
    progress = Warned(lambda done, *_: seen.append(done), notes.append, lambda: "OFFER", clock=lambda: now[0])
    for done in range(1, items + 1):
        progress(done, items, "unit")
        now[0] += seconds_an_item
    assert seen == [*range(1, items + 1)]
    return notes


def test_a_table_that_will_take_long_is_told_of_once_with_what_is_left():
    assert notes_at(10.0, 1000) == ["At this pace the table takes 2.8 hours more. OFFER"]
    (note,) = notes_at(2.0, 1000)  # after a minute, or 30 items, 970 are left
    assert note == "At this pace the table takes 32 minutes more. OFFER"


def test_a_table_that_takes_no_longer_than_is_bearable_is_not_told_of():
    assert notes_at(1.0, int(SLOW_S)) == []
    assert notes_at(500.0, 10) == []  # nothing is left when the pace is known


def test_the_offer_names_the_table_that_suits_best_and_the_whole_command(tmp_path: Path):
    table = profile(SPACE, SimulatedDevice(SimulatedMachine()), folder=tmp_path)
    wanted = replace(table.conditions, device="board", chip="another", batch=8)

    def kept(folder: str, **changes: object) -> Path:
        conditions = replace(table.conditions, **changes)  # pyright: ignore[reportArgumentType]
        path = tmp_path / "tables" / folder / "simulated.json"
        path.parent.mkdir(parents=True)
        LatencyTable(
            conditions, table.space, table.started, table.finished, table.entries, table.calibration, table.anchor_ms
        ).save(path)
        return path

    assert known_table([tmp_path / "tables"], SPACE, wanted) is None
    kept("a-emulated", batch=8, origin="emulated")
    kept("b-one-image", batch=1)
    (tmp_path / "tables" / "c-broken").mkdir()
    (tmp_path / "tables" / "c-broken" / "simulated.json").write_text("{")
    best = kept("d-the-same-batch", batch=8)
    kept("e-itself", device="board", chip="another", batch=8)
    assert known_table([tmp_path / "tables"], SPACE, wanted) == best

    notes: list[str] = []
    progress = warned(lambda *_: None, notes.append, SPACE, wanted, tmp_path / "tables")
    assert progress._offer().endswith(f"give: hwnas profile --device board --space simulated --batch 8 --from {best}")


def test_without_any_other_table_the_offer_still_tells_what_is_needed(tmp_path: Path):
    conditions = SimulatedDevice(SimulatedMachine()).conditions()
    progress = warned(lambda *_: None, lambda note: None, SPACE, conditions, tmp_path)
    assert "another device's TABLE" in progress._offer()
    assert progress._offer().endswith("--from TABLE")
