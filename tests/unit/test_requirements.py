"""Packages that must match each other, and are not resolved."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2] / "requirements"
BLIND = """
@register_meta("roi_align")
def meta_roi_align(): ...
@torch.library.register_fake("torchvision::nms")
def meta_nms(): ...
@torch.library.register_fake("torchvision::qnms")
def meta_qnms(): ...
"""


@pytest.mark.parametrize("name", ["torch", "torchvision"])
def test_cpus_and_gpus_have_the_same_release(name: str) -> None:
    """So the hashes of PyTorch's companions on PyPI are in the GPU's lock."""
    (cpu,) = re.findall(rf'^{name}="{name}==(.+)\+cpu"', (TOP / "install.sh").read_text(), re.M)
    (gpu,) = re.findall(rf"^{name}==(\S+)", (TOP / "gpu.lock").read_text(), re.M)
    assert cpu == gpu


def test_torchvision_looks_whether_its_operators_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOP))
    from torchvision_without_operators import mended

    once = mended(BLIND)
    assert once.count("_has_ops() else") == 2
    assert mended(once) == once, "a second installation changes nothing"
    for other in (BLIND.replace("qnms", "soft_nms"), once.replace("qnms", "soft_nms"), ""):
        with pytest.raises(ValueError, match="not the release"):
            mended(other)
    del sys.modules["torchvision_without_operators"]
