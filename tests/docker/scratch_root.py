"""Runs a Dockerfile's steps with this machine as its base image: what they write lies over `/` in a folder of its own.

An overlay takes the place of image layers and chroot that of the engine, so it needs root and Linux. The steps are run
as they are written; what is not shown is that the real base image has what they use.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import field as member
from pathlib import Path

from tests.docker.dockerfile import ROOT, build_context, defaults, expand, inherited, stages

PYTHON = Path(sys.base_prefix) / "bin"
# What a package index is reached with here; Docker's builds have it as predefined arguments or not at all.
NETWORK = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k.lower().endswith("_proxy")}


@dataclass
class Image:
    """What the steps have made: files in `folder`, and the settings of a process that starts there."""

    folder: Path
    environment: dict[str, str] = member(default_factory=lambda: {"PATH": f"{PYTHON}:/usr/sbin:/usr/bin:/sbin:/bin"})
    workdir: str = "/"
    user: str = "0:0"

    def inside(self, path: str) -> Path:
        """The place of a path of the image, relative to its working directory, in `folder`."""
        return self.folder / os.path.join(self.workdir, path).lstrip("/")  # noqa: PTH118  # an absolute `path` wins

    def command(
        self, arguments: Sequence[str], environment: Mapping[str, str], mounts: Mapping[str, Path] | None = None
    ) -> list[str]:
        """A command that runs `arguments` in the image, as the process itself: a signal reaches it.

        With `mounts` (read-only, by their place) the root is read-only too, as in docker-compose.yml.
        """
        work, merged = (self.folder.with_name(f"{self.folder.name}-{name}") for name in ("work", "merged"))
        for each in (work, merged, *(self.inside(place) for place in mounts or ())):
            each.mkdir(parents=True, exist_ok=True)
        script = [f"mount -t overlay overlay -o lowerdir=/,upperdir={self.folder},workdir={work} {merged}"]
        script += [] if mounts is None else [f"mount -o remount,bind,ro {merged}"]
        script += [f"mount --rbind /{name} {merged}/{name}" for name in ("proc", "dev")]
        script += [f"mount --bind -o ro {source} {merged}{place}" for place, source in (mounts or {}).items()]
        script += [] if mounts is None else [f"mount -t tmpfs tmpfs {merged}/tmp"]
        variables = [f"{name}={value}" for name, value in {**self.environment, **environment}.items()]
        uid, gid = self.user.split(":")
        process = ["chroot", str(merged), "setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
        process += [] if mounts is None else ["--bounding-set=-all", "--no-new-privs"]
        process += ["env", "-i", "-C", self.workdir, *variables, *arguments]
        script.append(f"exec {shlex.join(process)}")
        return ["unshare", "--mount", "sh", "-ec", "\n".join(script)]


def build(file: str, stage: str, folder: Path, **arguments: str) -> Image:
    """The image of a stage of docker/`file`; `arguments` are its build arguments."""
    image = Image(folder / stage)
    _make_python_reachable(image)
    values = {**defaults(file), **arguments}
    for instruction, text in inherited(file, stage):
        if instruction == "ENV":
            for pair in shlex.split(text):
                name, _, value = pair.partition("=")
                image.environment[name] = expand(value, {**values, **image.environment})
        elif instruction == "WORKDIR":
            image.workdir = text
            image.inside(".").mkdir(parents=True, exist_ok=True)
        elif instruction == "USER":
            image.user = text
        elif instruction == "RUN":
            script = " ".join(word for word in text.split(" ") if not word.startswith("--mount="))
            command = image.command(["sh", "-ec", script], {**NETWORK, **values, **image.environment})
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
        elif instruction == "COPY":
            _copy(file, image, shlex.split(text), folder, arguments)
    return image


def _make_python_reachable(image: Image) -> None:
    """The image has `python` on its path, and every user may go there."""
    place = image.inside(str(PYTHON))
    place.mkdir(parents=True, mode=0o755)
    for parent in place.relative_to(image.folder).parents:
        (image.folder / parent).chmod(0o755)
    if not (PYTHON / "python").exists():
        (place / "python").symlink_to(f"python3.{sys.version_info.minor}")


def _copy(file: str, image: Image, words: list[str], folder: Path, arguments: Mapping[str, str]) -> None:
    """COPY, from the build context or from another stage, which is built for it and then no longer needed."""
    *sources, destination = words
    target = image.inside(destination)
    if sources[0].startswith("--from="):
        stage = sources.pop(0).removeprefix("--from=")
        assert stage in stages(file)
        [source] = sources
        other = build(file, stage, folder, **arguments)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(other.inside(source), target)
        shutil.rmtree(other.folder)
        return
    for path in build_context():
        for pattern in sources:
            relative = None
            if path.match(pattern) and len(path.parts) == len(Path(pattern).parts):
                relative = Path(path.name) if destination.endswith("/") else Path()
            with suppress(ValueError):
                relative = relative or path.relative_to(pattern)
            if relative is not None:
                (target / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / path, target / relative)
