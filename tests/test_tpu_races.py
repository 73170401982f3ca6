"""The kernel's copies and waits, under JAX's race detector; and that these tests would see a fault."""

from typing import Any

import pytest
from cases import Case, assert_close
from tpu_interpreter import interpret, small_tiles, tiles_in_stages

from pallas_kernels.tpu import kernel

CASES = [
    Case(batch=3, head_dim=128, capacity=640, block=16, dtype="bfloat16", lengths=(640, 0, 300)),
    Case(batch=2, head_dim=64, capacity=640, layout="BSH", mask="2d", bias="batch"),
    Case(batch=1, head_dim=64, capacity=640, int8=True, padding=9, lengths=(600,)),
    Case(batch=1, heads=8, kv_heads=8, head_dim=128, capacity=52, layout="BSND", dtype="bfloat16"),
]
MODES = ["on_wait", "eager"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_races(case: Case, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    args, kwargs = case.inputs()
    # JAX raises if there is a race.
    assert_close(*interpret(args, kwargs, detect_races=True, dma_execution_mode=mode), args, kwargs)


@pytest.mark.parametrize("many_copies, mode", [(False, "eager"), (True, "on_wait"), (True, "eager")])
def test_no_races_of_tiles_in_stages(many_copies: bool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles_in_stages(monkeypatch, many_copies=many_copies)
    args, kwargs = Case(batch=1, head_dim=128, capacity=1100, block=16, dtype="bfloat16", lengths=(1100,)).inputs()
    assert_close(*interpret(args, kwargs, detect_races=True, dma_execution_mode=mode), args, kwargs)


def test_no_races_between_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch, cores=2)
    case = Case(batch=3, head_dim=128, capacity=640, block=16, dtype="bfloat16", lengths=(640, 0, 300))
    args, kwargs = case.inputs()
    assert_close(*interpret(args, kwargs, detect_races=True, num_cores_or_threads=2), args, kwargs)


def no_wait_for_whole_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel._Fetch, "wait_full", lambda self, slot: None)


class NextSlot:
    """The slots of a tile, one off."""

    def __init__(self, tiles: Any, slots: int):
        self.tiles, self.slots = tiles, slots

    at = property(lambda self: self)

    def __getitem__(self, index: tuple[Any, Any]) -> Any:
        slot, j = index
        return self.tiles.at[(slot + 1) % self.slots, j]


def refills_the_slot_being_read(monkeypatch: pytest.MonkeyPatch) -> None:
    start_full = kernel._Fetch.start_full

    def start(self: Any, *place: Any) -> None:
        tiles = NextSlot(self.refs.value_tile, self.plan.tuning.slots)  # the slot after the freed one is being read
        astray = kernel._Fetch(self.refs._replace(value_tile=tiles), self.plan, *self.rows_of.values())
        start_full(astray, *place)

    monkeypatch.setattr(kernel._Fetch, "start_full", start)


@pytest.mark.parametrize("fault", [no_wait_for_whole_tiles, refills_the_slot_being_read])
def test_a_planted_fault_is_caught(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small_tiles(monkeypatch)
    fault(monkeypatch)
    args, kwargs = Case(batch=1, head_dim=128, capacity=640, lengths=None, dtype="bfloat16").inputs()
    with pytest.raises(Exception, match=r"(?i)race"):  # whatever it raises, which no documentation names
        interpret(args, kwargs, detect_races=True, dma_execution_mode="eager")
