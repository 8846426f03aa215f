"""Packs vLLM and what it needs into pieces that fit through a narrow door.

For a GPU machine without network that has PyTorch and Triton: `python -m tests.gpu.bundle`, here,
fills an ignored folder with pieces of at most 60 MiB; `unpack.py` puts them together there, one by
one as they come. Parts that nothing here uses are left out (`LEFT_OUT`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from tests.gpu.shapes import BUNDLED, TOKENIZER, tokenizer_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

TOP = Path(__file__).parents[2]
PIECE_BYTES = 58 << 20
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_35", "manylinux_2_34", "manylinux_2_31", "manylinux_2_28",
             "manylinux_2_27", "manylinux_2_17", "manylinux2014", "manylinux1")  # fmt: skip
LEFT_OUT = re.compile(
    r"_vllm_fa2_C|/vllm-rs$|_qutlass_C|third_party/deep_gemm/|third_party/fmha_sm100/|_flashkda_C"
    r"|swagger-ui|\.jpg$|nixl_ep_cu13/|libucx_perftest|\.scripts/|/tests?/"
)
"""FlashAttention 2 (FlashAttention 3 stays, and Triton's attention needs neither), the Rust front,
kernels for other chips or kinds of model, what NIXL measures itself with, tests."""


@dataclass
class Piece:
    number: int
    members: list[tuple[Path, str, int]] = field(default_factory=list)
    """Wheel, name inside it, packed bytes."""
    size: int = 0

    @property
    def name(self) -> str:
        return f"piece-{self.number}.zip"


def requirements(lock: str, wanted: str) -> list[str]:
    """`name==version` of each wanted package. Raises SystemExit for one that the lock lacks."""
    versions = dict(re.findall(r"^([a-z0-9-]+)==([^ \\]+)", lock, re.MULTILINE))
    names = [n for line in wanted.splitlines() if not line.startswith("#") for n in line.split()]
    if missing := [n for n in names if n not in versions]:
        raise SystemExit(f"not in the lock file: {', '.join(missing)}")
    return [f"{name}=={versions[name]}" for name in names]


def download(folder: Path, names: list[str]) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(folder),
               "--implementation", "cp", "--python-version", PYTHON]  # fmt: skip
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_x86_64"]
    subprocess.run([*command, *names], check=True)


def tokenizer(folder: Path) -> Path:
    """An archive of the models' tokenizer, to be treated as a wheel."""
    found, path = tokenizer_folder(), folder / "tokenizer.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in TOKENIZER:
            if (found / name).exists():
                archive.write(found / name, f"{BUNDLED}/{name}")
    return path


def members(wheels: list[Path]) -> Iterator[tuple[Path, str, int]]:
    """The files of the wheels that are taken along."""
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                if not info.is_dir() and not LEFT_OUT.search(info.filename):
                    yield wheel, info.filename, info.compress_size


def unmet(wheels: list[Path]) -> list[str]:
    """Libraries that are left out and that one which is not names as its own need."""
    found = set()
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            libraries = [n for n in archive.namelist() if re.search(r"\.so(\.[\d.]+)?$", n)]
            gone = {n.rpartition("/")[2].encode() for n in libraries if LEFT_OUT.search(n)}
            kept = [n for n in libraries if not LEFT_OUT.search(n)] if gone else []
            for name in kept:
                content = archive.read(name)
                found |= {g.decode() for g in gone if b"\0" + g + b"\0" in content}
    return sorted(found)


def divide(found: list[tuple[Path, str, int]], most: int = PIECE_BYTES) -> list[Piece]:
    """First fit, the largest first. Raises SystemExit for a file that fits no piece."""
    pieces: list[Piece] = []
    for member in sorted(found, key=lambda m: (-m[2], m[1])):
        size = member[2] + 2 * len(member[1]) + 200  # Headers: twice the name, and some.
        if size > most:
            raise SystemExit(f"{member[1]} has {size} bytes packed; a piece has {most}")
        piece = next((p for p in pieces if p.size + size <= most), None)
        if piece is None:
            piece = Piece(len(pieces) + 1)
            pieces.append(piece)
        piece.members.append(member)
        piece.size += size
    return pieces


def write(piece: Piece, folder: Path) -> dict[str, str | int]:
    """Pack it anew; what the manifest says of it."""
    path = folder / piece.name
    opened: dict[Path, zipfile.ZipFile] = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for wheel, name, _ in piece.members:
            if wheel not in opened:
                opened[wheel] = zipfile.ZipFile(wheel)
            archive.writestr(archive_name(name), opened[wheel].read(name))
    for source in opened.values():
        source.close()
    content = path.read_bytes()
    return {
        "name": piece.name,
        "bytes": len(content),
        "files": len(piece.members),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def archive_name(name: str) -> str:
    """Where a wheel's file is installed: data folders lead to the same place."""
    found = re.match(r"[^/]+\.data/(?:purelib|platlib)/(.*)", name)
    return found[1] if found else name


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bundle", description=__doc__)
    parser.add_argument("--out", type=Path, default=TOP / "gpu-bundle")
    parser.add_argument("--wheels", type=Path, help="downloaded before; else they are now")
    given = parser.parse_args()
    lock = (TOP / "requirements/gpu.lock").read_text(encoding="utf-8")
    names = requirements(lock, (Path(__file__).parent / "bundle.in").read_text(encoding="utf-8"))
    shutil.rmtree(given.out, ignore_errors=True)
    given.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.wheels or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob("*.whl")):
            download(folder, names)
        wheels = [*sorted(folder.glob("*.whl")), tokenizer(Path(temporary))]
        if needed := unmet(wheels):
            raise SystemExit(f"left out, and needed by what is not: {', '.join(needed)}")
        pieces = divide(list(members(wheels)))
        told = [write(piece, given.out) for piece in pieces]
    (given.out / "manifest.json").write_text(json.dumps({"pieces": told}, indent=1) + "\n")
    for one in told:
        print(f"{one['name']}: {int(one['bytes']) / 2**20:.1f} MiB, {one['files']} files")


if __name__ == "__main__":
    main()
