"""The judge: every request has exactly one outcome, and what is none of the expected ones is a failure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile

from perf.soak.ended import Ended
from perf.soak.errand import Ask, Ending, Errand, Via
from perf.soak.outages import Outages


class Outcome(str, Enum):
    COMPLETED = "completed"
    REFUSED = "refused"  # bad input, as it has to be
    OVERFLOW = "overflow"  # the queue was full
    DEADLINE = "deadline"  # the request's own
    CANCELLED = "cancelled"  # by us
    DISCONNECTED = "disconnected"  # by us
    STUB_LOST = "stub_lost"  # the process that held it was killed; typed
    AWAY = "away"  # Triton refused it while the model was loaded again
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: Outcome
    reason: str = ""  # of a failure


_STUB_LOST = re.compile(r"the process of (\S+) that had this request died; send it again")
_OVERFLOW = re.compile(r"queue( of tenant .*)? is full: \d+ requests waiting, limit \d+")
_CANCELLED = "the request was cancelled"
_DEADLINE = "timeout_ms passed before it finished"
_TRACEBACK = re.compile(r"Traceback|File \"|\.py\b|0x[0-9a-f]{8}")
_AWAY = re.compile(
    r"Stub process .* is not healthy|unknown model|is not ready|no available versions|not found|is unloading"
    r"|in ensemble '\S+'|[Ff]ailed to process the request"
)
"""Triton's own words while a model's process is dead, or the model is being loaded again."""


def judge(errand: Errand, ended: Ended, reference: Mapping[Ask, Sequence[str]], outages: Outages, name: str) -> Verdict:
    """`reference`: texts of asks from an undisturbed time, by sequence. `name` is the text model's."""
    failure = _broken_promise(errand, ended) or _wrong_text(errand, ended, reference.get(errand.ask))
    if failure:
        return Verdict(Outcome.FAILED, failure)
    if ended.error is not None:
        return _judge_error(errand, ended, outages, name)
    if errand.fault is not None:
        return Verdict(Outcome.FAILED, "bad input was accepted")
    if ended.has_left:
        return Verdict(Outcome.DISCONNECTED if errand.ending is Ending.DISCONNECT else Outcome.CANCELLED)
    reasons = {reason for given in ended.reasons.values() for reason in given}
    if errand.ending is Ending.STOP and "cancelled" in reasons:
        return Verdict(Outcome.CANCELLED)
    if sorted(ended.reasons) != list(range(errand.ask.num_sequences)):
        return Verdict(Outcome.FAILED, f"it ended with finish reasons for sequences {sorted(ended.reasons)} only")
    if not reasons <= {"stop", "length"}:
        return Verdict(Outcome.FAILED, f"finish reasons {sorted(reasons)}")
    return Verdict(Outcome.COMPLETED)


def _broken_promise(errand: Errand, ended: Ended) -> str:
    if ended.has_hung:
        return f"no end after {ended.ended_s - ended.started_s:.0f} s"
    if ended.error is not None and _TRACEBACK.search(ended.error):
        return f"a traceback or an address was sent: {ended.error[:300]}"
    doubled = [sequence for sequence, reasons in ended.reasons.items() if len(reasons) > 1]
    if ended.num_finals > 1 or doubled:
        return f"{ended.num_finals} final responses; more than one finish reason for sequences {doubled}"
    if ended.num_after_final:
        return f"{ended.num_after_final} responses after the final one"
    if errand.via is Via.GRPC and not ended.has_left and ended.error is None and not ended.num_finals:
        return "the stream ended without a final response"
    return ""


def _wrong_text(errand: Errand, ended: Ended, expected: Sequence[str] | None) -> str:
    if expected is None:
        return ""
    for sequence, text in ended.texts.items():
        if sequence >= len(expected):
            return f"sequence {sequence} of {len(expected)}"
        is_whole = ended.reasons.get(sequence, ["cancelled"])[0] in ("stop", "length")
        if text != expected[sequence] if is_whole else not expected[sequence].startswith(text):
            return f"other text than undisturbed, sequence {sequence}: {_difference(text, expected[sequence])}"
    return ""


def _difference(text: str, expected: str) -> str:
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, expected, strict=False)))
    around = slice(max(0, same - 10), same + 20)
    return f"at character {same} of {len(expected)} {text[around]!r} instead of {expected[around]!r}"


def _judge_error(errand: Errand, ended: Ended, outages: Outages, name: str) -> Verdict:
    error = ended.error or ""
    if errand.fault is not None and errand.fault.expected in error:
        if errand.via is not Via.GRPC and ended.status not in errand.fault.statuses:
            return Verdict(Outcome.FAILED, f"HTTP status {ended.status} for {error!r}")
        return Verdict(Outcome.REFUSED)
    is_excused = outages.excuse(errand.target.steps(name), ended.started_s, ended.ended_s)
    if is_excused and _STUB_LOST.search(error):
        return Verdict(Outcome.STUB_LOST)
    if is_excused and _AWAY.search(error):
        return Verdict(Outcome.AWAY)
    if errand.fault is None and _OVERFLOW.search(error):
        return Verdict(Outcome.OVERFLOW)
    if _DEADLINE in error and errand.ask.option("timeout_ms", 0):
        return Verdict(Outcome.DEADLINE)
    if errand.ending is Ending.STOP and _CANCELLED in error:
        return Verdict(Outcome.CANCELLED)
    return Verdict(Outcome.FAILED, f"unexpected error (status {ended.status}): {error[:300]}")


@dataclass(slots=True)
class Tally:
    """Outcomes so far. `num_sent` is counted by the clients when they send, independently of the outcomes."""

    num_sent: int = 0
    outcomes: Counter[Outcome] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, errand: Errand, verdict: Verdict) -> None:
        self.outcomes[verdict.outcome] += 1
        if verdict.outcome is Outcome.FAILED:
            self.failures.append(f"{errand.label}: {verdict.reason}")

    @property
    def num_unaccounted(self) -> int:
        return self.num_sent - sum(self.outcomes.values())
