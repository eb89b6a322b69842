"""Each claim against what a machine measured."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.report.claims import Claim
from benchmarks.report.figures import command_for, evaluate, names_in, show
from benchmarks.report.fill import Filler
from benchmarks.report.sources import Machine

MET, NOT_MET, NOT_MEASURED = "met", "not met", "not measured here"


@dataclass(frozen=True)
class Verdict:
    """`verdict`: one of the three above. `why`: the reason, a note, or the command that would measure it."""

    verdict: str
    value: str = "–"
    why: str = ""


def judge(claim: Claim, machine: Machine, filler: Filler) -> Verdict:
    value = evaluate(machine, claim.figure)
    if value is None:
        reference_only = any(name.startswith("reference.") for name in names_in(claim.figure))
        if reference_only and not machine.is_gpu:
            return Verdict(NOT_MEASURED, why="on a GPU only")
        return Verdict(NOT_MEASURED, why=f"`{command_for(claim.figure, machine.is_gpu)}`")
    met = (claim.low is None or value >= claim.low) and (claim.high is None or value <= claim.high)
    reason = claim.note if met else claim.why or claim.note
    return Verdict(MET if met else NOT_MET, show(value, claim.form), filler.fill(reason))
