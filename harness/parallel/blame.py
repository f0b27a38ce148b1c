"""Several ranks, one of which died, raised or fell silent: which one, and during what. Those that only waited for it are not
to blame: a transport that times out, or is closed by a dead neighbour, says so in the survivors."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from harness.case import Case
from harness.verdict import Finding, Stage, Status, Verdict
from harness.worker import death, vitals
from harness.worker.coredump import Facts
from harness.worker.death import Death
from harness.worker.log import tail
from harness.worker.protocol import Message

STAGES = ("start", "inputs", "dispatch", "prepare", "launch", "return", "combine")
EXCHANGES = ("dispatch", "return")
Splits = tuple[tuple[int, ...], tuple[int, ...]]  # packets that a rank sends to each rank, and receives from each

Due = Mapping[str, Sequence[Splits]]  # exchange -> the splits of each rank that the routing asks for


@dataclass
class Answer:
    """What became of one rank's request. stage: the last it told of; waits: for other ranks, in there; splits: what it said of
    each exchange; reply: None where it gave none; raised: what its kernel or host raised; hang: where it is silent; gpu: what
    its device said of its death."""

    rank: int
    stage: str = STAGES[0]
    waits: bool = False
    splits: dict[str, list[Splits]] = field(default_factory=dict)
    reply: Message | None = None
    raised: Message | None = None
    dead: bool = False
    exit_code: int | None = None
    link: str = ""
    hang: str = ""
    output: str = ""
    resident: int = 0
    oom_kills: int = 0
    gpu: Facts | None = None
    at: float = 0.0

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self.dead or self.reply is not None or self.raised is not None

    @property
    def bad(self) -> bool:
        """It did not do what it was asked."""
        return self.reply is None

    @property
    def victim(self) -> bool:
        """Waiting for others when it ended, in a way that their end explains: an exception, or an abort of the transport."""
        return self.bad and self.waits and (not self.dead or self.exit_code == -signal.SIGABRT)

    def hear(self, message: Message) -> None:
        """Take in one message."""
        if "stage" in message:
            self.stage, self.waits = str(message["stage"]), bool(message.get("waits"))
            if "send" in message:
                told = tuple(map(int, message["send"])), tuple(map(int, message["receive"]))
                self.splits.setdefault(self.stage, []).append(told)
            return
        self.at = time.monotonic()
        if "raised" in message:
            self.raised = message["raised"]
        else:
            self.reply = message


def verdict(case: Case, subject: str, answers: Sequence[Answer], limit_s: float, due: Due) -> Verdict:
    """Of a case that did not come to an end."""
    first, ranks = min((a for a in answers if a.bad), key=_guilt), len(answers)
    status, how, evidence = _how(first, limit_s)
    others = {str(a.rank): _state(a) for a in answers if a is not first}
    evidence |= {"rank": first.rank, "during": first.stage, "others": others}
    text = f"rank {first.rank} of {ranks}, during {first.stage}: {how}"
    if first.victim:
        text = f"the ranks wait for each other: {', '.join(f'rank {a.rank} {_state(a)}' for a in answers)}"
    if wrong := misrouted(answers, due):  # whatever came of rows that nobody sent
        status, text, evidence["rank"], evidence["during"] = Status.WRONG, f"{wrong[0]}; then: {text}", *wrong[1:]
    return Verdict(case.id, subject, status, Stage.LAUNCH, text, (Finding("rank", text, evidence),))


def _guilt(answer: Answer) -> tuple[bool, bool, float]:
    """The least is to blame: no victim, dead rather than silent, the first to die or the one that came least far."""
    return answer.victim, not answer.over, answer.at if answer.over else STAGES.index(answer.stage)


def misrouted(answers: Sequence[Answer], due: Due) -> tuple[str, int, str] | None:
    """(text, rank, exchange) of the first rank that moves other numbers of rows than the routing says."""
    for exchange in EXCHANGES:
        for answer in answers:
            for told in answer.splits.get(exchange, ()):
                wanted = due[exchange][answer.rank]
                if wanted != told:
                    counts = f"it sends {list(told[0])} rows and receives {list(told[1])}"
                    routed = f"the routing says {list(wanted[0])} and {list(wanted[1])}"
                    return f"rank {answer.rank}, during {exchange}: {counts}; {routed}", answer.rank, exchange
    return None


def accused(verdict: Verdict, wrong: tuple[str, int, str]) -> Verdict:
    """A wrong result of ranks that moved wrong numbers of rows."""
    text, rank, exchange = wrong
    finding = Finding("rank", text, {"rank": rank, "during": exchange})
    return replace(verdict, reason=f"{text}; {verdict.reason}", findings=(finding, *verdict.findings))


def _how(answer: Answer, limit_s: float) -> tuple[Status, str, dict[str, Any]]:
    evidence: dict[str, Any] = {"output": tail(answer.output)}
    if answer.raised is not None:
        said = answer.raised
        text = (str(said["text"]).strip().splitlines() or [""])[0][:300]
        return Status(said["status"]), f"{said['kind']}: {text}", {**evidence, "type": said["kind"]}
    last = Death(Stage.LAUNCH, answer.exit_code, answer.hang, answer.link, answer.output, answer.resident, answer.oom_kills)
    status, memory = death.status(last, vitals.memory_limit())
    if answer.hang:
        return Status.HUNG, f"no answer within {limit_s:g} s: {answer.hang}", evidence
    text = death.how(last) + (f" for lack of memory ({memory})" if memory else "")
    if answer.gpu is not None:
        text, evidence["gpu"] = f"{text}: {answer.gpu.text}", asdict(answer.gpu)
    elif not memory and (words := death.last_words(answer.output)):
        text += f", having said: {words}"
    return status, text, {**evidence, "exit_code": answer.exit_code}


def _state(answer: Answer) -> str:
    if not answer.bad:
        return "is done"
    how = "waits" if answer.waits else "is silent"
    if answer.dead:
        how = "died"
    elif answer.raised is not None:
        how = "gave up" if answer.waits else "raised"
    return f"{how} in {answer.stage}"
