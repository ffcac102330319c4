"""An environment is made once, made anew when what it holds changes, and a failure says what pip said."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.peers.environments import ROOT, PeerUnavailable, Recipe, prepared

RECIPE = Recipe(name="store", packages=("store==1.0", "client==2.0"))


class Commands:
    """What would have been run; commands with ``fails`` among their words fail instead."""

    def __init__(self, fails: str = "", says: str = "") -> None:
        self.seen: list[list[str]] = []
        self._fails, self._says = fails, says

    def __call__(self, command: Sequence[str], folder: Path) -> None:
        self.seen.append(list(command))
        if command[0] == "apt-get":
            (folder / "libx_1.0_amd64.deb").touch()
        if command[0] == "dpkg":
            library = folder / command[-1] / "usr" / "lib" / "libx.so.1"
            library.parent.mkdir(parents=True)
            library.touch()
        if self._fails in command:
            raise subprocess.CalledProcessError(1, command, output=self._says)


def test_second_call_runs_nothing(tmp_path: Path) -> None:
    run = Commands()
    first = prepared(RECIPE, tmp_path, run)
    (command,) = run.seen

    assert prepared(RECIPE, tmp_path, run) == first
    assert run.seen == [command]
    assert command[-3:] == ["--no-deps", "store==1.0", "client==2.0"]
    assert command[command.index("--python") + 1] == str(first.python)


def test_other_pins_make_it_anew(tmp_path: Path) -> None:
    environment = prepared(RECIPE, tmp_path, Commands())
    (environment.folder / "left").touch()
    run = Commands()

    prepared(Recipe(name="store", packages=("store==1.1",)), tmp_path, run)

    assert run.seen[0][-1] == "store==1.1"
    assert not (environment.folder / "left").exists()


def test_failed_install_is_told_and_tried_again(tmp_path: Path) -> None:
    says = "Looking\n\nERROR: No matching distribution found for store==1.0\n"
    with pytest.raises(PeerUnavailable, match="cannot be installed: Looking ERROR: No matching distribution"):
        prepared(RECIPE, tmp_path, Commands(fails="store==1.0", says=says))

    run = Commands()
    prepared(RECIPE, tmp_path, run)
    assert len(run.seen) == 1


def test_missing_program_makes_a_peer_unavailable(tmp_path: Path) -> None:
    def run(command: Sequence[str], folder: Path) -> None:
        raise FileNotFoundError(2, "No such file or directory", command[0])

    with pytest.raises(PeerUnavailable, match="No such file or directory"):
        prepared(RECIPE, tmp_path, run)


def test_system_libraries_are_unpacked_and_found_by_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    recipe = Recipe(name="store", packages=("store==1.0",), system_packages=("libx",))
    environment = prepared(recipe, tmp_path, Commands())

    variables = environment.variables({"PORT": "1"})

    assert variables["LD_LIBRARY_PATH"] == f"{environment.folder}/system/usr/lib:/before"
    assert variables["PORT"] == "1"
    assert not list(environment.folder.glob("*.deb"))


def test_its_python_sees_packages_of_the_project(tmp_path: Path) -> None:
    environment = prepared(RECIPE, tmp_path, Commands())

    code = "import sys, pydantic, kv_agent; print(sys.prefix)"
    done = subprocess.run(
        [environment.python, "-c", code], capture_output=True, text=True, cwd="/", check=True
    )

    assert done.stdout.strip() == str(environment.folder)
    assert ROOT.is_dir()
