"""Each claim against what a machine measured."""

from dataclasses import dataclass

from benchmarks.report.claims import Claim
from benchmarks.report.figures import alternatives, command_for, evaluate, names_in, show, workload_of
from benchmarks.report.fill import Filler
from benchmarks.report.sources import Machine

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured here"


@dataclass(frozen=True)
class Verdict:
    """`verdict`: one of the three above. `workload`: that, or the point of a sweep, on which it was measured. `why`:
    the reason, a note, or the command that would measure it."""

    verdict: str
    workload: str
    value: str = "–"
    why: str = ""


def judge(claim: Claim, machine: Machine, filler: Filler) -> Verdict:
    for figure in alternatives(claim.figure):
        value = evaluate(machine, figure)
        if value is not None:
            break
    else:
        workload = workload_of(claim.figure)
        why = f"`{command_for(claim.figure, machine.is_gpu, machine.model)}`"
        if machine.peers is None and any(name.startswith("reference.") for name in names_in(claim.figure)):
            why = "on a GPU of `reports/peers` only"
        elif workload == "quality" and machine.model.startswith("random:"):
            why = "random weights have no quality to lose"
        return Verdict(NOT_MEASURED, workload, why=why)
    met = (claim.low is None or value >= claim.low) and (claim.high is None or value <= claim.high)
    reason = claim.note if met else claim.why or claim.note
    point = names_in(figure)[0].split(".")[0]
    return Verdict(MET if met else NOT_MET, point, show(value, claim.form), filler.fill(reason))
