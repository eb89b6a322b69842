"""The plan's way to all ranks: rank 0's runner tells it and runs it, the others run what they hear."""

import time
from contextlib import suppress

from common.errors import UserError
from common.execution.parallel.messages import PlanReader, PlanWriter
from common.execution.parallel.ranks import OVER, PATIENCE, Ranks
from common.plan import StepPlan
from common.request import SampledToken
from common.runner import Runner

FORGET = b"forget"


class LeadRunner(Runner):
    """A stage's runner on rank 0, which takes the others along. It goes on with what the stage has `made`."""

    def __init__(self, made: Runner, ranks: Ranks, max_num_seqs: int) -> None:
        vars(self).update(vars(made))
        self.ranks, self._writer = ranks, PlanWriter(max_num_seqs)

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

    def forget(self) -> None:
        super().forget()
        with suppress(UserError), self.ranks.together():
            self.ranks.tell(FORGET)


def follow(runner: Runner, ranks: Ranks) -> None:
    """Run what rank 0 tells, until it is over. As on rank 0, at most two steps are in flight."""
    reader, launched = PlanReader(runner.model.config.vocab_size), 0
    while (message := ranks.hear()) != OVER:
        if message == FORGET:
            runner.forget()
            launched = 0
            continue
        runner.submit(reader.read(message))
        launched += 1
        if launched > 1:
            runner.collect()
            launched = 1
