"""Where errors of memory end, so that requests do not."""

from __future__ import annotations

import pytest

from kv_agent.vllm_plugin.guard import attempt


def fail(error: BaseException) -> int:
    raise error


def test_a_job_that_succeeds_gives_its_result() -> None:
    assert attempt(lambda: 3, 7) == 3
    assert attempt(lambda: None, 7) is None


def test_a_job_that_fails_gives_the_safe_answer_and_its_traceback_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert attempt(lambda: fail(ZeroDivisionError("why")), 7) == 7
    (logged,) = caplog.records
    assert logged.exc_info is not None
    assert isinstance(logged.exc_info[1], ZeroDivisionError)
    assert logged.message == "a memory job failed; its tokens are computed, its turn is not stored"


def test_a_job_may_have_its_own_words_for_what_failed(caplog: pytest.LogCaptureFixture) -> None:
    attempt(lambda: fail(ZeroDivisionError("why")), 7, "torch does it")
    assert [logged.message for logged in caplog.records] == ["a memory job failed; torch does it"]


def test_being_asked_to_stop_is_no_error_of_a_job() -> None:
    with pytest.raises(KeyboardInterrupt):
        attempt(lambda: fail(KeyboardInterrupt()), 7)
