"""vLLM's own ExampleConnector: a file for each layer of a prompt, found again by the hash of whole blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from benchmarks.engine_speed.engines import BenchEngine


@contextmanager
def opened(model: Path, folder: Path) -> Iterator[BenchEngine]:
    """In this process's environment: it comes with vLLM.

    A prompt that is computed in several steps kills its engine, so this one computes all of it in one.
    """
    config = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder)},
    }
    with closing(BenchEngine(model, kv_transfer_config=config, max_num_batched_tokens=9216)) as engine:
        yield engine
