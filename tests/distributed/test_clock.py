"""Times of a device by events that a stand-in records, and by the wall clock."""

from types import SimpleNamespace

import pytest
import torch

from mmpeft_ds.distributed import clock
from mmpeft_ds.distributed.clock import Clock, StepTimer


class Device:
    """A stand-in for a GPU: work that is queued takes its milliseconds once the device is let run."""

    def __init__(self):
        self.queue: list = []
        self.milliseconds, self.waits = 0.0, 0

    def work(self, milliseconds: float) -> None:
        self.queue.append(milliseconds)

    def run(self) -> None:
        for item in self.queue:
            if isinstance(item, Event):
                item.at = self.milliseconds
            else:
                self.milliseconds += item
        self.queue.clear()


class Event:
    device: Device

    def __init__(self, enable_timing: bool = False):
        self.timing, self.at = enable_timing, None

    def record(self) -> None:
        self.device.queue.append(self)

    def query(self) -> bool:
        return self.at is not None

    def synchronize(self) -> None:
        if self.at is None:
            self.device.waits += 1
            self.device.run()

    def elapsed_time(self, ended: "Event") -> float:
        assert self.timing and ended.timing
        return ended.at - self.at


@pytest.fixture
def gpu() -> SimpleNamespace:
    device = Device()
    event = type("EventOfDevice", (Event,), {"device": device})
    return SimpleNamespace(device=device, clock=Clock(torch.device("cuda", 0), event))


def step(gpu: SimpleNamespace, timer: StepTimer, forward: float, backward: float) -> dict[str, float]:
    for _ in range(2):  # micro-batches
        with timer.part("forward"):
            gpu.device.work(forward)
        with timer.part("backward"):
            gpu.device.work(backward)
    times = timer.finish()  # before the program waits for anything
    gpu.device.run()  # the reduction at the end of a step does
    return times


def test_a_gpu_is_timed_by_its_own_work_one_step_later_and_never_waited_for(gpu):
    timer = StepTimer(gpu.clock)
    assert step(gpu, timer, 100, 300) == {}
    assert step(gpu, timer, 7, 9) == pytest.approx({"forward": 0.2, "backward": 0.6})
    assert step(gpu, timer, 0, 0) == pytest.approx({"forward": 0.014, "backward": 0.018})
    assert gpu.device.waits == 0


def test_work_that_a_gpu_has_not_done_is_left_out_and_not_waited_for(gpu):
    timer = StepTimer(gpu.clock)
    with timer.part("forward"):
        gpu.device.work(50)
    timer.finish()
    assert timer.finish() == {} and gpu.device.waits == 0


def test_a_span_that_is_asked_for_its_seconds_is_waited_for(gpu):
    """Control: the stand-in would have seen a wait above."""
    began = gpu.clock.now()
    gpu.device.work(50)
    span = gpu.clock.since(began)
    assert not span.is_over and span.seconds() == pytest.approx(0.05) and gpu.device.waits == 1 and span.is_over


def test_the_wall_clock_times_the_same_step(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    timer = StepTimer(Clock(torch.device("cpu")))
    for seconds in (1.0, 2.5):
        with timer.part("forward"):
            now[0] += seconds
        now[0] += 100  # between parts
    assert timer.finish() == {"forward": 3.5}
    assert timer.finish() == {}
