"""Mooncake's store: its master in a process of its own, vLLM's connector for it, over TCP on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers.environments import Recipe, prepared
from benchmarks.peers.remote_engine import RemoteEngine, Served, engine_beside
from benchmarks.peers.servers import HOST, free_ports

RECIPE = Recipe(
    name="mooncake",
    packages=("mooncake-transfer-engine-non-cuda==0.3.13.post1",),
    system_packages=("libibverbs1", "libnl-3-200", "libnl-route-3-200"),  # linked, and not used over TCP
)
_HOLDS_BYTES = 1 << 30
_BUFFER_BYTES = 256 << 20


@contextmanager
def opened(model: Path, folder: Path) -> Iterator[RemoteEngine]:
    """An engine that holds a segment of the store, beside the store's master; raises ``PeerUnavailable``."""
    environment = prepared(RECIPE)
    port, metrics_port = free_ports(2)
    settings = {
        "metadata_server": "P2PHANDSHAKE",
        "master_server_address": f"{HOST}:{port}",
        "protocol": "tcp",
        "device_name": "",
        "global_segment_size": _HOLDS_BYTES,
        "local_buffer_size": _BUFFER_BYTES,
    }
    settings_file = folder / "mooncake.json"
    settings_file.write_text(json.dumps(settings), encoding="utf-8")
    variables = environment.variables(
        {"MOONCAKE_CONFIG_PATH": str(settings_file), "VLLM_HOST_IP": HOST, "MC_LOG_LEVEL": "WARNING"}
    )
    master = [
        str(environment.program("mooncake_master")),
        f"-rpc_address={HOST}", f"-rpc_port={port}",
        f"-metrics_host={HOST}", f"-metrics_port={metrics_port}",
    ]  # fmt: skip
    config = {"kv_connector": "MooncakeStoreConnector", "kv_role": "kv_both"}
    served = Served(config=config, server=master, port=port, environment=environment, variables=variables)
    with engine_beside(served, model, folder) as engine:
        yield engine
