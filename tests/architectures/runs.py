"""Runs of a family: its model, its reference, and a group that is asked everything."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deploy.local.parts import PartDied
from tests.architectures.compare import Answer, Judged, Truth, Verdict, judge
from tests.architectures.passes import CACHED, KILLED, ONE_BY_ONE, SALTED, Passes, run_passes
from tests.architectures.prompts import LENGTH_MAX, PROMPTS
from tests.asking import EVERYTHING
from tests.forks import ForkedGroup
from tests.zygote import Start

if TYPE_CHECKING:
    from pathlib import Path

    from tests.architectures.families import Family
    from tests.forks import Forked, Zygote

ENGINE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", str(LENGTH_MAX)]
WORKER = ["--num-gpu-blocks-override", "1024", "--kv-answer-s", "20", "--kv-read-s", "40"]
"""Room for every prompt of a pass three times over, and patience for a busy machine."""
PREFILL = ["--max-num-batched-tokens", "256"]
"""Long prompts are computed, and handed over, in chunks."""
ROUTER = ["--disaggregate", "always", "--hedge-ratio", "0", "--enable-prompt-tokens-details"]
ROUNDS = 50 if EVERYTHING else 3
MODEL_S, REFERENCE_S = 300.0, 600.0
BEFORE = (ONE_BY_ONE, CACHED, SALTED)
"""Passes in which nothing fails, so that every prompt is computed once."""


@dataclass(frozen=True, slots=True)
class Variant:
    """How a group hands off."""

    transport: str
    checksums: str

    @property
    def flags(self) -> list[str]:
        return ["--kv-transports", self.transport, "--kv-checksums", self.checksums]

    def __str__(self) -> str:
        return f"{self.transport}, {self.checksums} checksums"


VARIANTS = (Variant("ucx", "sampled"), Variant("tcp", "full"))
MORE_VARIANTS = (*VARIANTS, Variant("ucx", "full"), Variant("tcp", "sampled"))


class NoReference(Exception):
    """Plain vLLM did not answer; the message has the end of its log."""


@dataclass(slots=True)
class Run:
    """One group's life."""

    family: Family
    variant: Variant
    truths: dict[str, Truth] = field(default_factory=dict)
    passes: Passes = field(default_factory=Passes)
    refusal: str | None = None
    """The last line of the part that ended at the start; None when all were ready."""
    died: str | None = None
    """The last line of a part that died while it was asked."""
    rounds: int = 0
    """So many were to be asked."""
    logs: dict[str, str] = field(default_factory=dict)
    statuses: dict[str, int | None] = field(default_factory=dict)

    def judged(self, name: str) -> dict[str, Judged]:
        """By prompt, of one pass."""
        tolerance = 1e-3 if name == ONE_BY_ONE else self.family.batch_tolerance
        answers = self.passes.answers[name]
        return {p: judge(answer, self.truths[p], tolerance) for p, answer in answers.items()}

    def judged_rounds(self) -> list[dict[str, Judged]]:
        tolerance = self.family.batch_tolerance
        return [
            {p: judge(answer, self.truths[p], tolerance) for p, answer in answers.items()}
            for answers in self.passes.rounds
        ]

    def computed_twice(self, name: str) -> dict[str, str]:
        """Prompts of a pass that were not handed over, by what was noted of them."""
        found = {}
        for prompt, answer in self.passes.answers[name].items():
            if reason := twice(answer):
                found[prompt] = reason
        return found

    def said(self) -> str:
        """A line for people."""
        if self.refusal is not None:
            return f"did not start: {self.refusal}"
        parts = []
        for name in self.passes.answers:
            judged = self.judged(name)
            twice = len(self.computed_twice(name)) if name != KILLED else 0
            parts.append(f"{name} {_counted(judged)}" + (f", {twice} twice" if twice else ""))
        rounds = [judged for each in self.judged_rounds() for judged in each.items()]
        if rounds:
            counts = Counter(judged.verdict.value for _, judged in rounds)
            parts.append(f"{len(self.passes.rounds)} rounds {_listed(counts)}")
        if self.died:
            parts.append(f"died: {self.died}")
        if self.passes.kept:
            parts.append(f"kept {self.passes.kept}")
        return "; ".join(parts)


def twice(answer: Answer) -> str | None:
    record = answer.record
    if answer.error is not None:
        return None  # No answer is another fault.
    if record["prefill_worker"] is None:
        return "computed by the decode worker"
    if record["kv_failed"] is not None:
        return str(record["kv_failed"])
    if record["attempts"] != 1:
        return f"{record['attempts']} attempts"
    # A prompt's last token is the decode worker's, unless the first of the answer was relayed.
    nothing_before = record["prompt_tokens"] == 1
    handed = record["kv_tokens"] > 0 or nothing_before
    return None if handed else "no KV tokens were handed over"


def _counted(judged: dict[str, Judged]) -> str:
    return _listed(Counter(each.verdict.value for each in judged.values()))


def _listed(counts: Counter[str]) -> str:
    return "/".join(f"{counts[v]} {v.value}" for v in Verdict if counts[v])


_RESULTS: list[dict[str, Any]] = []


def results() -> list[dict[str, Any]]:
    """All runs of this session, for its report."""
    return _RESULTS


class Reference:
    """Plain vLLM at work on all prompts."""

    def __init__(self, process: Forked, out: Path, log: Path) -> None:
        self._process = process
        self._out = out
        self._log = log
        self._status: int | None = None

    def truths(self) -> dict[str, Truth]:
        """Its answers by prompt, once it is done. Raises `NoReference`."""
        if self._status is None:
            self._status = self._process.end(REFERENCE_S)
        if self._status != 0:
            end = self._log.read_text(errors="replace")[-20_000:]
            raise NoReference(f"status {self._status}:\n{end}")
        return {name: Truth(**said) for name, said in json.loads(self._out.read_text()).items()}


class Bench:
    """Makes models and references once, and runs each row and variant once."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self.zygote = zygote
        self.folder = folder
        self._runs: dict[tuple[str, Variant], Run] = {}
        self._references: dict[str, Reference] = {}
        (folder / "prompts.json").write_text(json.dumps(PROMPTS))

    def model(self, name: str) -> Path:
        """Its folder."""
        folder = self.folder / name
        if not (folder / "config.json").exists():
            log = self.folder / f"{name}.made.log"
            start = Start("tests.architectures.models", [name, str(folder)], str(log))
            status = self.zygote.start(start).end(MODEL_S)
            assert status == 0, f"{name} was not made:\n{log.read_text()[-2000:]}"
        return folder

    def reference(self, family: Family) -> Reference:
        """The one that answers `family`'s prompts: it may still be at it."""
        options = {"max_model_len": LENGTH_MAX, "block_size": family.block, **family.reference}
        key = json.dumps([family.model, family.reference])
        if key not in self._references:
            self._references[key] = self._refer(family, options)
        return self._references[key]

    def _refer(self, family: Family, options: dict[str, Any]) -> Reference:
        out, log = (self.folder / f"{family.name}.reference.{end}" for end in ("json", "log"))
        arguments = [
            str(self.model(family.model)), str(self.folder / "prompts.json"), str(out),
            json.dumps(options),
        ]  # fmt: skip
        start = Start("tests.architectures.reference", arguments, str(log))
        return Reference(self.zygote.start(start), out, log)

    def run(self, family: Family, variant: Variant) -> Run:
        key = (family.name, variant)
        if key not in self._runs:
            self._runs[key] = run = self._run(family, variant)
            _RESULTS.append(
                {"family": family.name, "variant": str(variant), "said": run.said(), **_facts(run)}
            )
        return self._runs[key]

    def group(self, family: Family, variant: Variant, *, prefill: int = 2) -> ForkedGroup:
        """Not started."""
        block = [] if family.block is None else ["--block-size", str(family.block)]
        return ForkedGroup(
            self.zygote,
            str(self.model(family.model)),
            change=family.change,
            prefill=prefill,
            flags=[*ENGINE, *WORKER, *block, *variant.flags, *family.flags],
            role_flags={
                "prefill": [*PREFILL, *family.prefill_flags],
                "decode": [*family.decode_flags],
            },
            router_flags=ROUTER,
        )

    def _run(self, family: Family, variant: Variant) -> Run:
        rounds = ROUNDS if variant == VARIANTS[0] else 0
        run = Run(family, variant, rounds=rounds)
        reference = self.reference(family)
        group = self.group(family, variant)
        try:
            with group:
                self._ask(run, group)
        except PartDied as died:
            run.refusal = last_line(str(died))
        run.truths = reference.truths()
        run.logs, run.statuses = group.logs, group.statuses
        return run

    def _ask(self, run: Run, group: ForkedGroup) -> None:
        try:
            run_passes(group, str(self.model(run.family.model)), run.rounds, run.passes)
        except PartDied as died:
            run.died = last_line(str(died))


def last_line(text: str) -> str:
    """Without what Python's own tracker of semaphores says after a process has gone."""
    lines = (line.strip() for line in reversed(text.splitlines()))
    return next((line for line in lines if line and "resource_tracker" not in line), "")


def _facts(run: Run) -> dict[str, Any]:
    return {
        name: {
            prompt: [judged.verdict.value, judged.why, run.passes.answers[name][prompt].record]
            for prompt, judged in run.judged(name).items()
        }
        for name in run.passes.answers
    } | {"twice": {n: run.computed_twice(n) for n in BEFORE if n in run.passes.answers}}
