"""Puts the pieces of `bundle.py` together: `python3 unpack.py BUNDLE SITE`, as often as one comes.

Needs nothing but Python. Says which pieces are still missing; status 0 once there are none, 3 until
then. SITE then goes onto PYTHONPATH.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zipfile
from pathlib import Path

TO_COME = 3


def unpack(bundle: Path, site: Path) -> list[str]:
    """Unpack every piece that is there and was not yet; the names of those still to come.

    Raises SystemExit for a piece that is not as the manifest says.
    """
    pieces = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["pieces"]
    site.mkdir(parents=True, exist_ok=True)
    record = site / ".pieces"
    have = set(record.read_text().split()) if record.exists() else set()
    for piece in pieces:
        path = bundle / piece["name"]
        if piece["sha256"] in have or not path.exists():
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() != piece["sha256"]:
            raise SystemExit(f"{path.name} is damaged, or of another bundle")
        with zipfile.ZipFile(path) as archive:
            archive.extractall(site)
        with record.open("a") as file:
            file.write(piece["sha256"] + "\n")
        have.add(piece["sha256"])
    return [piece["name"] for piece in pieces if piece["sha256"] not in have]


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    missing = unpack(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"still to come: {', '.join(missing)}" if missing else "complete")
    return TO_COME if missing else 0


if __name__ == "__main__":
    sys.exit(main())
