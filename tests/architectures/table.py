"""docs/models.md's table, from the rows of `families`: `python -m tests.architectures.table`."""

from __future__ import annotations

from pathlib import Path

from tests.architectures.families import FAMILIES, Equal, Family, NotHere, Refused, Unsure

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- begin: families -->\n", "<!-- end: families -->\n"
HEAD = ("Family", "With", "KV cache", "P/D handoff", "Blocks handed over", "Prefix index",
        "Images", "Adapters", "Checked by", "Seen")  # fmt: skip


def table() -> str:
    """In Markdown: a line for each row."""
    lines = [HEAD, tuple("---" for _ in HEAD), *map(_line, FAMILIES)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _line(family: Family) -> tuple[str, ...]:
    served = isinstance(family.expected, Equal)
    return (
        family.name,
        family.given,
        family.kv,
        _handoff(family),
        _moved(family) if served else "",
        ("yes" if family.caches else "no prefix cache") if served else "",
        ("yes" if family.images else "no") if served else "",
        "not yet" if served else "",
        _checked(family),
        family.seen or "not yet run",
    )


def _handoff(family: Family) -> str:
    match family.expected:
        case Equal():
            return "equal"
        case Refused(summary=summary):
            return f"refused: {summary}"
        case NotHere(reason=reason):
            return f"not on this CPU: {reason}"
        case Unsure(reason=reason):
            return f"not compared: {reason}"


def _moved(family: Family) -> str:
    return "all" if family.windows is None else "windows alone"


def _checked(family: Family) -> str:
    match family.expected:
        case Equal():
            tests = ["test_families"]
        case Refused() | NotHere() | Unsure():
            tests = ["test_refused"]
    if family.images:
        tests.append("test_images")
    where = "`make test`" if family.short else "`make test-long`"
    return f"{', '.join(f'`{t}`' for t in tests)} in {where}"


def page(text: str) -> str:
    """`text`, the whole page, with the table as it is now."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
