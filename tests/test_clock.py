"""parallel/clock.py: phases are disjoint, what waits for others is in `collectives`, and it costs next to nothing."""

import time
from itertools import count

import pytest
import torch

from lora_scale.parallel import clock
from lora_scale.parallel.clock import PhaseClock, exposed

CPU = torch.device("cpu")
WAITS = 2000  # about as many as a step of 100.7B parameters has on two tensor-parallel ranks, which takes seconds
EACH = 20e-6  # seconds: 2,000 of them are 1% of 4 s


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the time is one second after the one before."""
    ticks = count()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("ticking")
def test_waits_are_taken_out_of_their_phase() -> None:
    found = PhaseClock(CPU)
    for _ in range(2):
        with found.phase("forward"), exposed(CPU):  # 0 (1 2) 3: two seconds of three are the phase's own
            pass
    with found.phase("step"):
        pass
    assert found.take()() == {"forward": 4.0, "step": 1.0, "collectives": 2.0, "between": 2.0}
    assert found.take()() == {"collectives": 0.0, "between": 0.0}, "each take begins anew"


@pytest.mark.usefixtures("ticking")
def test_what_is_between_steps_counts_but_for_rests() -> None:
    found, seen = PhaseClock(CPU), []
    for rests in (False, False, True):
        if rests:
            found.rest()
        clock.time.perf_counter()
        with found.phase("step"):
            pass
        seen.append(found.take()()["between"])
    assert seen == [0.0, 2.0, 0.0]


@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize(("early", "between"), [(False, 2.0), (True, 4.0)])
def test_an_item_is_in_the_pause_before_a_step_but_where_that_was_begun_early(early: bool, between: float) -> None:
    """Not early: 3 seconds, of which the item took one. Early: 1 before the first phase, and 3 behind it."""
    found = PhaseClock(CPU)
    timed = found.timed("data", "ab")
    next(timed)
    with found.phase("step"):
        pass
    found.take()
    if early:
        with found.phase("forward"):
            pass
    next(timed)
    with found.phase("backward"):
        pass
    seen = found.take()()
    assert (seen["data"], seen["between"]) == (1.0, between)


@pytest.mark.usefixtures("ticking")
def test_outside_of_phases_nothing_is_kept() -> None:
    found = PhaseClock(CPU)
    with pytest.raises(KeyError), found.phase("backward"):
        raise KeyError
    with exposed(CPU):
        pass
    assert found.take()() == {"collectives": 0.0, "between": 0.0}


@pytest.mark.usefixtures("ticking")
def test_items_are_timed_while_they_come() -> None:
    found = PhaseClock(CPU)
    assert list(found.timed("data", "abc")) == ["a", "b", "c"]
    assert found.take()() == {"data": 3.0, "collectives": 0.0, "between": 0.0}


def test_a_wait_costs_microseconds() -> None:
    found, seconds = PhaseClock(CPU), []
    for _ in range(5):  # the best of five: other work on the machine must not decide
        began = time.perf_counter()
        with found.phase("forward"):
            for _ in range(WAITS):
                with exposed(CPU):
                    pass
        found.take()()
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < WAITS * EACH


@pytest.mark.gpu
def test_on_a_gpu_the_devices_own_time_counts() -> None:
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    found = PhaseClock(device)
    for _ in range(2):  # the first loads the library
        with found.phase("forward"):
            a @ a
            with exposed(device):
                torch.cuda._sleep(50_000_000)  # cycles: more than 0.02 s
        torch.cuda.synchronize()
        seconds = found.take()()
    assert seconds["collectives"] > 0.02 > seconds["forward"] > 0
    times = []
    for _ in range(5):  # the best of five
        with found.phase("forward"):
            began = time.perf_counter()
            for _ in range(WAITS):
                with exposed(device):
                    pass
            issued = time.perf_counter() - began
        torch.cuda.synchronize()
        began = time.perf_counter()
        found.take()()
        times.append(issued + time.perf_counter() - began)
    assert min(times) < WAITS * EACH
