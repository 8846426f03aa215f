"""The Dockerfile read as stages, and the files that a builder would be sent."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

TOP = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Instruction:
    """`flags` are what stands before the rest, without their dashes: `from=build`."""

    name: str
    flags: tuple[str, ...]
    rest: str

    @property
    def words(self) -> list[str]:
        """The exec form's strings."""
        words: list[str] = json.loads(self.rest)
        return words

    @property
    def pairs(self) -> dict[str, str]:
        """What ENV and LABEL set."""
        return dict(word.split("=", 1) for word in shlex.split(self.rest))


@dataclass(slots=True)
class Stage:
    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, name: str) -> list[Instruction]:
        return [i for i in self.instructions if i.name == name]

    def last(self, name: str) -> Instruction:
        return self.all(name)[-1]


def stages(text: str, arguments: dict[str, str]) -> dict[str, Stage]:
    """Every stage by name, in order, with build arguments put in. PATH and the like stay."""
    known: dict[str, str] = {}
    found: list[Stage] = []
    for instruction in _instructions(text):
        if instruction.name == "ARG":
            name, _, default = instruction.rest.partition("=")
            known[name] = arguments.get(name, default or known.get(name, ""))
        elif instruction.name == "FROM":
            base, _, name = re.split(r"\s+(AS)\s+", _expand(instruction.rest, known))
            found.append(Stage(name, base))
        else:
            rest = instruction.rest
            if instruction.name != "RUN":  # There the shell does it.
                rest = _expand(rest, known)
            found[-1].instructions.append(Instruction(instruction.name, instruction.flags, rest))
    return {stage.name: stage for stage in found}


def lineage(of: str, among: dict[str, Stage]) -> list[Stage]:
    """The stage after all that it stands on, the outermost first."""
    stage = among[of]
    return [*(lineage(stage.base, among) if stage.base in among else []), stage]


def _instructions(text: str) -> list[Instruction]:
    lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]
    found = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, rest = line.split(None, 1)
        flags = []
        while match := re.match(r"--(\S+)\s+", rest):
            flags.append(match[1])
            rest = rest[match.end() :]
        found.append(Instruction(name, tuple(flags), rest.strip()))
    return found


def _expand(text: str, known: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda m: known.get(m[1], m[0]), text)


# ------------------------------------------------------------ the context


def sent(path: str, ignore: str) -> bool:
    """Whether a builder gets this file: of .dockerignore's patterns the last that fits decides."""
    parents = [str(p) for p in Path(path).parents][:-1]
    verdict = True
    for line in ignore.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        fits = re.compile(_regex(pattern.removeprefix("!"))).fullmatch
        if any(fits(p) for p in [path, *parents]):
            verdict = pattern.startswith("!")
    return verdict


def _regex(pattern: str) -> str:
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^]]+\])", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(meaning.get(p, p if p.startswith("[") else re.escape(p)) for p in parts)


def copy_context(into: Path) -> None:
    """What git knows or would add, less what .dockerignore keeps back."""
    ignore = (TOP / ".dockerignore").read_text(encoding="utf-8")
    for file in tracked():
        if sent(file, ignore):
            (into / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TOP / file, into / file)


def tracked(*patterns: str) -> list[str]:
    """Files of the working tree that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=TOP,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return [f for f in listed if (TOP / f).is_file()]
