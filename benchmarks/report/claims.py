"""What each optimisation is said to gain (templates/claims.toml), and what each machine's figures say to it."""

import tomllib
from dataclasses import dataclass

from benchmarks.report.blocks import TEMPLATES
from benchmarks.report.figures import alternatives, command_for, evaluate, names_in, show, workload_of
from benchmarks.report.fill import Filler
from benchmarks.report.sources import Machine


@dataclass(frozen=True)
class Claim:
    """`figure`: what is measured, in the language of `benchmarks.report.figures`; `form`: how it is written.

    Met: `low` or more, `high` or less. A range that may be exceeded has only `low` here, and both in `expected`.
    `figure` may name a second workload behind ` or `, for machines that ran that one.
    `why`: said where it is not met; it may hold {figure:...}. `note`: said wherever it is measured.
    """

    stage: str
    said: str
    expected: str
    how: str
    figure: str
    form: str = "times"
    low: float | None = None
    high: float | None = None
    why: str = ""
    note: str = ""


CLAIMS = [Claim(**one) for one in tomllib.loads((TEMPLATES / "claims.toml").read_text(encoding="utf-8"))["claim"]]
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
