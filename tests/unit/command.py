"""The ``kv-agent`` command as a shell sees it: what it prints, and how it ends."""

from __future__ import annotations

import pytest

from kv_agent import cli


def lines_of(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> list[str]:
    """What the command prints when it ends with ``code`` and complains about nothing."""
    assert cli.main([str(arg) for arg in argv]) == code
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


def error_of(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one sentence of a command that fails."""
    assert cli.main([str(arg) for arg in argv]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line
