"""Looks up every pinned package among the known vulnerabilities, by pip-audit.

python deploy/audit.py [--required] [--service NAME] [FILE]

A service that cannot be reached, or that knows of nothing, is no proof: each is asked first about a
version that is known to be vulnerable. Without any service it says "not audited" and exits with 0,
or with 1 if it is `--required`; with 1 too if a vulnerability is found.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PINNED = Path(__file__).parents[1] / "constraints.txt"
SERVICES = ("pypi", "osv")
#: Both services have had entries for it for years.
VULNERABLE = "django==1.11"
TIMEOUT_S = 15


def ask(service: str, requirements: Path) -> list[dict[str, Any]] | None:
    """What a service says of each package, None if it could not be asked to the end."""
    options = ["--no-deps", "--disable-pip", "--format", "json", "--desc", "off"]
    quiet = ["--progress-spinner", "off", "--timeout", str(TIMEOUT_S)]
    command = [sys.executable, "-m", "pip_audit", "-s", service, "-r", str(requirements)]
    run = subprocess.run(  # noqa: S603 - every part is ours
        [*command, *options, *quiet], capture_output=True, text=True, check=False
    )
    try:
        dependencies: list[dict[str, Any]] = json.loads(run.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"{service}: {(run.stderr.strip().splitlines() or ['no answer'])[-1]}")
        return None
    return dependencies


def knows_any(service: str) -> bool:
    """Whether a service can be reached and knows of a vulnerability that there is."""
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder, "vulnerable.txt")
        requirements.write_text(f"{VULNERABLE}\n", encoding="utf-8")
        found = ask(service, requirements)
    if found is None:
        return False
    knows = any(package.get("vulns") for package in found)
    if not knows:
        print(f"{service}: does not know that {VULNERABLE} is vulnerable")
    return knows


def report(found: list[dict[str, Any]], service: str) -> int:
    """Print what was found; returns the number of vulnerabilities."""
    count = 0
    for package in found:
        if "skip_reason" in package:
            print(f"not audited: {package['name']}: {package['skip_reason']}")
        for entry in package.get("vulns", []):
            count += 1
            cure = ", ".join(entry["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {entry['id']}, fixed in {cure}")
    audited = sum("vulns" in package for package in found)
    print(f"{audited} packages audited by {service}: {count} known vulnerabilities")
    return count


def main() -> int:
    """Ask the first service that can say something; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=PINNED)
    parser.add_argument("--service", action="append", choices=SERVICES)
    parser.add_argument("--required", action="store_true")
    asked = parser.parse_args()
    if find_spec("pip_audit") is None:
        parser.error("pip-audit is not installed; install the extra `check`")
    for service in asked.service or SERVICES:
        found = ask(service, asked.file) if knows_any(service) else None
        if found is not None:
            return 1 if report(found, service) else 0
    print("not audited: the vulnerability service cannot be reached")
    return 1 if asked.required else 0


if __name__ == "__main__":
    sys.exit(main())
