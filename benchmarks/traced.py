"""What `trace` records, and the pictures of it read."""

from dataclasses import dataclass

from common.watch.trace import StepTrace


@dataclass(frozen=True)
class Traced:
    """What one stage did. `capacity`: token slots of its KV memory."""

    stage: str
    trace: StepTrace
    capacity: int
    block_size: int | None
