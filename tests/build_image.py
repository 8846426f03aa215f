"""Carries out the Dockerfile without a container engine: overlays, chroots, and a mount namespace.

`python -m tests.build_image --base ROOTFS --layers FOLDER -- version` builds into FOLDER, runs
`tandem version` in the result as an engine would (its uid, a read-only root, PID 1), and leaves
no mount behind. Root and Linux only. docs/image.md tells of ROOTFS and of what this can't show.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.dockerfile import TOP, Instruction, Stage, copy_context, lineage, stages

_INSIDE = "TANDEM_BUILD_IMAGE_INSIDE"


def main() -> int:
    args = _arguments()
    if _INSIDE not in os.environ:  # Mounts made in a namespace of their own end with it.
        again = ["unshare", "--mount", sys.executable, "-m", "tests.build_image", *sys.argv[1:]]
        return subprocess.run(again, env={**os.environ, _INSIDE: "1"}, check=False).returncode
    text = (TOP / "Dockerfile").read_text(encoding="utf-8")
    build = Build(args, stages(text, dict(a.split("=", 1) for a in args.arg)))
    root = build.stage("image")
    return build.run_container(root, args.command) if args.command else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True, help="stands for the base image")
    parser.add_argument("--layers", type=Path, required=True, help="kept, and not made twice")
    parser.add_argument("--arg", action="append", default=[], help="a build argument, NAME=VALUE")
    parser.add_argument("--secret", action="append", default=[], help="ID=FILE")
    parser.add_argument(
        "--bind", action="append", default=[], help="of this machine, while building"
    )
    parser.add_argument("--mount", action="append", default=[], help="OUTSIDE:INSIDE, read-only")
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE for the container")
    parser.add_argument("--cache", type=Path, help="the container's /cache; a fresh one without")
    parser.add_argument("command", nargs="*", help="after the entrypoint")
    return parser.parse_args()


class Build:
    """One target's stages as overlays, each over those that it stands on."""

    def __init__(self, args: argparse.Namespace, found: dict[str, Stage]) -> None:
        self._args = args
        self._stages = found
        self._roots: dict[str, Path] = {}
        self._secrets = dict(s.split("=", 1) for s in args.secret)

    def stage(self, name: str) -> Path:
        """Its root folder, mounted; its steps are carried out unless they have been before."""
        if name in self._roots:
            return self._roots[name]
        stage = self._stages[name]
        if stage.base in self._stages:
            self.stage(stage.base)
        for copy in stage.all("COPY"):
            for flag in copy.flags:
                self.stage(flag.removeprefix("from="))
        place: Path = self._args.layers.resolve() / name
        done = place / "done"
        for folder in ("upper", "work", "root"):
            (place / folder).mkdir(parents=True, exist_ok=True)
        below = [self._args.layers.resolve() / s.name / "upper"
                 for s in reversed(lineage(name, self._stages)[:-1])]  # fmt: skip
        lower = ":".join(map(str, [*below, self._args.base.resolve()]))
        options = f"lowerdir={lower},upperdir={place}/upper,workdir={place}/work"
        _run("mount", "-t", "overlay", "overlay", "-o", options, str(place / "root"))
        self._roots[name] = place / "root"
        if not done.exists():
            for instruction in stage.instructions:
                self._carry_out(instruction, name)
            done.touch()
        return self._roots[name]

    def _carry_out(self, instruction: Instruction, name: str) -> None:
        started = time.monotonic()
        if instruction.name == "COPY":
            self._copy(instruction, self._roots[name])
        elif instruction.name == "RUN":
            self._run_step(instruction, name)
        else:
            return
        taken = time.monotonic() - started
        print(f"{name}: {instruction.name} {instruction.rest[:60]} ({taken:.0f} s)", flush=True)

    def _copy(self, instruction: Instruction, root: Path) -> None:
        *sources, target = instruction.rest.split()
        if instruction.flags:
            origin = self._roots[instruction.flags[0].removeprefix("from=")]
        else:
            origin = self._args.layers.resolve() / "context"
            shutil.rmtree(origin, ignore_errors=True)
            copy_context(origin)
        for source in sources:
            shutil.copytree(
                origin / source.lstrip("/"), root / target.lstrip("/"), symlinks=True,
                dirs_exist_ok=True,
            )  # fmt: skip

    def _run_step(self, instruction: Instruction, name: str) -> None:
        root = self._roots[name]
        mounts = ["/proc", "/dev", "/etc/resolv.conf", *self._args.bind]
        pairs = [(m, m) for m in mounts]
        for flag in instruction.flags:
            options = dict(o.partition("=")[::2] for o in flag.removeprefix("mount=").split(","))
            if options["type"] == "secret" and options["id"] in self._secrets:
                pairs.append((self._secrets[options["id"]], options["target"]))
        bound = [_bind(outside, root, inside) for outside, inside in pairs]
        try:
            _run("chroot", str(root), "/bin/sh", "-c", instruction.rest, env=self._env(name))
        finally:
            for path in reversed(bound):
                _run("umount", str(path))

    def _env(self, name: str) -> dict[str, str]:
        env = {"PATH": "/usr/local/bin:/usr/local/sbin:/usr/bin:/usr/sbin:/bin:/sbin"}
        for stage in lineage(name, self._stages):
            for step in stage.all("ENV"):
                env |= {k: v.replace("$PATH", env["PATH"]) for k, v in step.pairs.items()}
        return env

    def run_container(self, root: Path, command: list[str]) -> int:
        """As an engine would: uid and entrypoint of the image, read-only root, PID 1."""
        image = self._stages["image"]
        uid, gid = image.last("USER").rest.split(":")
        cache = self._args.cache or self._args.layers.resolve() / "cache"
        cache.mkdir(exist_ok=True)
        os.chown(cache, int(uid), int(gid))
        _bind(str(cache), root, "/cache")
        for pair in self._args.mount:
            outside, inside = pair.split(":")
            _run("mount", "-o", "remount,ro,bind", str(_bind(outside, root, inside)))
        for inside, options in (("tmp", "noexec,nosuid,nodev"), ("dev", "mode=755")):
            _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(root / inside))
        for device in ("null", "zero", "random", "urandom"):
            _bind(f"/dev/{device}", root, f"/dev/{device}")
        (root / "dev/shm").mkdir(mode=0o1777)
        _run("mount", "-t", "tmpfs", "tmpfs", str(root / "dev/shm"))
        _run("mount", "-t", "sysfs", "-o", "ro", "sysfs", str(root / "sys"))
        _run("mount", "-o", "remount,ro", str(root))
        env = self._env("image") | dict(e.split("=", 1) for e in self._args.env)
        container = ["unshare", "--pid", "--fork", "--kill-child", f"--mount-proc={root}/proc",
                     "chroot", str(root),
                     "setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups",
                     "--bounding-set=-all", "--no-new-privs",
                     "env", "-C", image.last("WORKDIR").rest,
                     *image.last("ENTRYPOINT").words, *command]  # fmt: skip
        return subprocess.run(container, env=env, check=False).returncode


def _bind(outside: str, root: Path, inside: str) -> Path:
    target = root / inside.lstrip("/")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir() if Path(outside).is_dir() else target.touch()
    _run("mount", "--bind", outside, str(target))
    return target


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    try:
        subprocess.run(command, check=True, env=env)
    except subprocess.CalledProcessError as failed:
        sys.exit(f"build_image: status {failed.returncode}: {' '.join(command)[:300]}")


if __name__ == "__main__":
    sys.exit(main())
