"""Environments of their own for peers, in ``build/peers``, on top of the project's.

An environment holds a peer's packages only; vLLM, torch and all else come from the project's. It is made
once: a stamp names what is in it, and is written last.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS_FOLDER = ROOT / "build" / "peers"
_INSTALL_TIMEOUT_S = 540
_LAST_LINES = 4

# Runs a command in a folder; raises OSError or subprocess.SubprocessError when it fails.
Runner = Callable[[Sequence[str], Path], None]


class PeerUnavailable(Exception):  # noqa: N818 - it is no error, a run goes on without it
    """This peer does not run here; the message says why in a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a peer's environment holds.

    ``packages`` are pip's, pinned and without what they depend on; ``system_packages`` Debian's shared
    libraries, which are unpacked and not installed.
    """

    name: str
    packages: Sequence[str]
    system_packages: Sequence[str] = ()

    @property
    def stamp(self) -> str:
        held = [str(ROOT), sys.version, *self.packages, *self.system_packages]
        return hashlib.sha256("\n".join(held).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def libraries(self) -> list[Path]:
        """Folders of the unpacked shared libraries."""
        return sorted({path.parent for path in (self.folder / "system").rglob("*.so.*")})

    def program(self, name: str) -> Path:
        return self.folder / "bin" / name

    def variables(self, more: Mapping[str, str]) -> dict[str, str]:
        """What a process of this environment has: this process's variables, and ``more``."""
        before = [path for path in (os.environ.get("LD_LIBRARY_PATH"),) if path]
        search = os.pathsep.join([*map(str, self.libraries), *before])
        found = {"LD_LIBRARY_PATH": search} if search else {}
        return {**os.environ, "PYTHONPATH": str(ROOT), **found, **more}


def run_quietly(command: Sequence[str], folder: Path) -> None:
    subprocess.run(
        command, cwd=folder, check=True, text=True, timeout=_INSTALL_TIMEOUT_S,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def prepared(recipe: Recipe, peers_folder: Path = PEERS_FOLDER, run: Runner = run_quietly) -> Environment:
    """The environment of ``recipe``, made when it is not there or holds something else.

    Raises ``PeerUnavailable`` when a package cannot be had.
    """
    environment = Environment(folder=peers_folder / recipe.name)
    stamp = environment.folder / "stamp"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == recipe.stamp:
        return environment
    shutil.rmtree(environment.folder, ignore_errors=True)
    try:
        _fill(environment, recipe, run)
    except (OSError, subprocess.SubprocessError) as err:
        raise PeerUnavailable(f"its packages cannot be installed: {_told(err)}") from err
    stamp.write_text(recipe.stamp, encoding="utf-8")
    return environment


def _fill(environment: Environment, recipe: Recipe, run: Runner) -> None:
    venv.create(environment.folder, with_pip=False, symlinks=True)
    # The project's pip: it installs as it is configured on this machine.
    pip = [sys.executable, "-m", "pip", "--python", str(environment.python)]
    run([*pip, "install", "--quiet", "--no-deps", *recipe.packages], environment.folder)
    if recipe.system_packages:
        run(["apt-get", "download", "--quiet", *recipe.system_packages], environment.folder)
        for package in sorted(environment.folder.glob("*.deb")):
            run(["dpkg", "-x", package.name, "system"], environment.folder)
            package.unlink()
    # After pip, which would not install what it finds there. By addsitedir and not by its bare path, so that
    # editable packages of the project are found as well.
    line = f"import site; site.addsitedir({str(_site_packages(Path(sys.prefix)))!r})\n"
    (_site_packages(environment.folder) / "project.pth").write_text(line, encoding="utf-8")


def _site_packages(prefix: Path) -> Path:
    return prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def _told(err: OSError | subprocess.SubprocessError) -> str:
    """The last lines of what a command said, or what went wrong instead."""
    output = err.stdout if isinstance(err, subprocess.CalledProcessError) else None
    lines = [line.strip() for line in str(output or err).splitlines() if line.strip()]
    return " ".join(lines[-_LAST_LINES:])
