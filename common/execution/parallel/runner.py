"""The plan's way to all ranks: rank 0's runner tells it and runs it, the others run what they hear."""

from contextlib import suppress

from common.errors import UserError
from common.execution.parallel.messages import PlanReader, PlanWriter
from common.execution.parallel.ranks import Ranks
from common.plan import StepPlan
from common.request import SampledToken
from common.runner import Runner

FORGET = b"forget"


class LeadRunner(Runner):
    """A stage's runner on rank 0, which takes the others along. made: what the stage has built; this goes on with it."""

    def __init__(self, made: Runner, ranks: Ranks, max_num_seqs: int) -> None:
        vars(self).update(vars(made))
        self.ranks, self._writer = ranks, PlanWriter(max_num_seqs)

    def submit(self, plan: StepPlan) -> None:
        with self.ranks.together():
            self.ranks.tell(self._writer.write(plan))
            super().submit(plan)

    def collect(self) -> dict[str, SampledToken]:
        with self.ranks.together():
            return super().collect()

    def forget(self) -> None:
        super().forget()
        if self.ranks.lost is None:
            with suppress(UserError), self.ranks.together():
                self.ranks.tell(FORGET)


def follow(runner: Runner, ranks: Ranks) -> None:
    """Run what rank 0 tells, until it is over. As on rank 0, at most two steps are in flight."""
    reader = PlanReader()
    while message := ranks.hear():
        if message == FORGET:
            runner.forget()
            continue
        runner.submit(reader.read(message))
        if runner.num_launched > 1:
            runner.collect()
