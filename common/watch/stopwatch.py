"""How long a step kept the device busy, and how long the device had been idle before."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class DeviceTime:
    """Seconds on the GPU's own clock. busy: from the step's first kernel to its last, gaps between them included;
    idle: from the end of the step before to the beginning of this one."""

    busy: float
    idle: float


class Lap:
    """Marks in the stream of work: one where it is made, one at `stop()`. On a CPU there is nothing to mark."""

    def __init__(self, device: torch.device) -> None:
        self.marks: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self.marks = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.marks[0].record()

    def stop(self) -> None:
        if self.marks is not None:
            self.marks[1].record()


class Stopwatch:
    """Waits for laps in the order in which they were started."""

    def __init__(self) -> None:
        self._last: torch.cuda.Event | None = None

    def wait(self, lap: Lap) -> DeviceTime | None:
        """Until the device has passed the lap's end; None on a CPU, where it has."""
        if lap.marks is None:
            return None
        begin, end = lap.marks
        end.synchronize()
        idle = self._last.elapsed_time(begin) / 1e3 if self._last is not None else 0.0
        self._last = end
        return DeviceTime(begin.elapsed_time(end) / 1e3, idle)

    def reset(self) -> None:
        self._last = None
