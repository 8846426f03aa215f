"""Lets torchvision be imported where its compiled part can't be loaded.

That part holds operators for detection models, and torchvision does without it: who calls one is
told so. Only of two operators, `nms` and `qnms`, does release 0.28 describe the shapes without
having looked whether they are there, so that its import fails, and with it that of every
transformers model. With this they are looked for, as the others are.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

BLIND = '@torch.library.register_fake("torchvision::{name}")\n'
LOOKS = (
    '@(torch.library.register_fake("torchvision::{name}")'
    " if torchvision.extension._has_ops() else lambda fn: fn)\n"
)


def mended(source: str) -> str:
    """`torchvision/_meta_registrations.py` as it should be. Raises ValueError for another one."""
    for name in ("nms", "qnms"):
        blind, looks = BLIND.format(name=name), LOOKS.format(name=name)
        if source.count(blind) + source.count(looks) != 1:
            raise ValueError(f"torchvision is not the release that this was written for: {name}")
        source = source.replace(blind, looks)
    return source


def main() -> None:
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        sys.exit("there is no torchvision here")
    path = Path(spec.origin).with_name("_meta_registrations.py")
    path.write_text(mended(path.read_text()))


if __name__ == "__main__":
    main()
