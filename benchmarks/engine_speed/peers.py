"""Other connectors that keep KV outside the engine, as arms beside ours.

What runs here comes with vLLM. Others need servers or environments of their own and are not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def example_connector(folder: Path) -> dict[str, Any]:
    """vLLM's own: a file for each layer of a prompt, found again by the hash of whole blocks of tokens.

    A prompt that is computed in several steps kills its engine, so this one computes all of it in one.
    """
    config = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(folder / "example")},
    }
    return {"kv_transfer_config": config, "max_num_batched_tokens": 9216}


# By name: an engine's options, given a folder.
PEERS: Mapping[str, Callable[[Path], dict[str, Any]]] = {"ExampleConnector": example_connector}
