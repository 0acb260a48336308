"""Does what a Dockerfile says in a folder, without Docker and without root.

    python3 tests/dockerfile.py Dockerfile FOLDER

Prints what a container would be started with, as JSON. It knows the instructions and options that
ours has, and refuses all others. Every path has the prefix of the build argument PREFIX, so nothing
outside of the folder is written.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

__all__ = ["Image", "build", "instructions"]

#: They say something about the image and do nothing while it is built.
_NOTED = {"CMD", "EXPOSE", "STOPSIGNAL", "USER", "VOLUME"}


@dataclass
class Image:
    """What a container would be started with.

    Attributes:
        environ: From ENV.
        workdir: From WORKDIR.
        noted: Arguments of the other instructions, by name.
    """

    environ: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    noted: dict[str, str] = field(default_factory=dict)

    @property
    def command(self):
        """The words of CMD."""
        return json.loads(self.noted["CMD"])

    @property
    def health_command(self):
        """The words of HEALTHCHECK's command."""
        return json.loads(self.noted["HEALTHCHECK"].partition(" CMD ")[2])


def instructions(path):
    """The instructions of a Dockerfile, each as its name and its arguments."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def build(path, prefix):
    """Follow a Dockerfile; the stages share the folder.

    Args:
        path: Of the Dockerfile; its folder is what COPY copies from.
        prefix: A new folder, the root of what would be the image.

    Returns:
        The last stage.
    """
    given = {"PREFIX": str(prefix)}
    image, known = Image(), {}
    for name, rest in instructions(path):
        if name == "FROM":
            image, known = Image({"PATH": os.environ["PATH"]}), {}
        elif name == "ARG":
            key, _, default = rest.partition("=")
            known[key] = given.get(key, default)
        elif name in ("CMD", "HEALTHCHECK"):
            image.noted[name] = rest
        else:
            _follow(name, rest, path.parent, image, known)
    return image


def _follow(name, rest, context, image, known):
    text = _filled(rest, known | image.environ)
    if name == "WORKDIR":
        Path(text).mkdir(parents=True, exist_ok=True)
        image.workdir = text
    elif name == "ENV":
        image.environ |= dict(word.split("=", 1) for word in text.split())
    elif name == "COPY":
        _copy(text.split(), context, Path(image.workdir))
    elif name == "RUN":
        environ = os.environ | image.environ
        subprocess.run(["/bin/sh", "-c", text], cwd=image.workdir, env=environ, check=True)
    elif name in _NOTED:
        image.noted[name] = text
    else:
        raise ValueError(f"{name} is not known here")


def _filled(text, values):
    def value(match):
        if match[1] not in values:
            raise ValueError(f"${{{match[1]}}} has no ARG or ENV")
        return values[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, text)


def _copy(words, context, workdir):
    """Copy as Docker does: the content of folders, files by their names."""
    options = [word for word in words if word.startswith("--")]
    *sources, target = words[len(options) :]
    # Stages share their files, and the owner of a file is whoever runs this.
    if not all(re.fullmatch(r"--(from=build|chown=\d+:\d+)", each) for each in options):
        raise ValueError(f"COPY {options} is not known here")
    from_stage = "--from=build" in options
    to = workdir / target
    for source in sources:
        found = Path(source) if from_stage else context / source
        if found.is_dir():
            if found != to:
                skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
                shutil.copytree(found, to, dirs_exist_ok=True, symlinks=True, ignore=skipped)
        else:
            name = found.name if target.endswith("/") else ""
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(found, to / name)


if __name__ == "__main__":
    print(json.dumps(asdict(build(Path(sys.argv[1]), Path(sys.argv[2])))))
