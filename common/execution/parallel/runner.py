"""The plan's way to all ranks: rank 0's runner tells it and runs it, the others run what they hear."""

import time

from common.execution.parallel.messages import PlanReader, PlanWriter
from common.execution.parallel.ranks import OVER, PATIENCE, Ranks
from common.plan import StepPlan
from common.request import SampledToken
from common.runner import Runner


class RankRunner(Runner):
    """A stage's runner on one of several ranks. It goes on with what the stage has `made`."""

    def __init__(self, made: Runner, ranks: Ranks, max_num_seqs: int) -> None:
        vars(self).update(vars(made))
        self.ranks, self._writer = ranks, PlanWriter(max_num_seqs, made.model.config.vocab_size)

    def submit(self, plan: StepPlan) -> None:
        with self.ranks.together():
            self.ranks.tell(self._writer.write(plan))
            super().submit(plan)

    def collect(self) -> dict[str, SampledToken]:
        with self.ranks.together():
            marks, begin = self._launched[0].lap.marks, time.monotonic()
            while marks is not None and not marks[1].query():  # NCCL waits for a rank that has ended, for ever
                time.sleep(0)
                late = time.monotonic() - begin > PATIENCE.seconds
                if late or self.ranks.lost is not None:
                    raise RuntimeError("timed out" if late else "")
            return super().collect()

    def follow(self) -> None:
        """Not on rank 0: run what it tells, until it is over. As there, at most two steps are in flight."""
        reader = PlanReader()
        while (message := self.ranks.hear()) != OVER:
            super().submit(reader.read(message))
            if len(self._launched) > 1:
                super().collect()
