"""Layers are done in order by all who have time, and nobody waits for what will never be done."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from kv_agent.vllm_plugin.layer_by_layer import LayerByLayer

NUM_LAYERS = 11


@pytest.mark.parametrize("num_helpers", [0, 1, 4])
@pytest.mark.parametrize("num_works", [0, 1, 3])
def test_every_work_is_done_once_for_every_layer_and_in_time(num_helpers: int, num_works: int) -> None:
    lock = threading.Lock()
    done: list[tuple[int, int]] = []

    def work(name: int, first: int, end: int) -> None:
        time.sleep(0.0005)
        with lock:
            done.extend((name, layer) for layer in range(first, end))

    works = [lambda first, end, name=name: work(name, first, end) for name in range(num_works)]
    by_layer = LayerByLayer(works, NUM_LAYERS)
    with ThreadPoolExecutor(max(1, num_helpers)) as helpers:
        for _ in range(num_helpers):
            helpers.submit(by_layer.help)
        for layer in range(NUM_LAYERS):
            by_layer.wait(layer)
            with lock:
                assert {(name, layer) for name in range(num_works)} <= set(done)
        by_layer.wait_for_all()
    assert sorted(done) == [(name, layer) for name in range(num_works) for layer in range(NUM_LAYERS)]


def test_without_helpers_no_more_is_done_than_is_waited_for() -> None:
    done: list[int] = []
    by_layer = LayerByLayer([lambda first, end: done.extend(range(first, end))], NUM_LAYERS)
    by_layer.wait(0)
    assert done == [0]
    by_layer.wait(2)
    assert done[-1] < NUM_LAYERS - 1


def test_nobody_waits_after_a_failure_and_nobody_works_any_more() -> None:
    done: list[int] = []
    begun, may_end = threading.Event(), threading.Event()

    def slow(first: int, end: int) -> None:
        begun.set()
        may_end.wait(10)
        done.append(first)

    def broken(first: int, end: int) -> None:
        raise RuntimeError("a kernel failed")

    by_layer = LayerByLayer([slow, broken], NUM_LAYERS)
    with ThreadPoolExecutor(1) as helpers:
        helpers.submit(by_layer.help)
        assert begun.wait(10)
        by_layer.wait(NUM_LAYERS - 1)
        assert by_layer.has_failed
        assert done == []
        waiting = threading.Thread(target=by_layer.wait_for_all)
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()  # somebody still writes
        may_end.set()
        waiting.join(10)
    assert done == [0]
