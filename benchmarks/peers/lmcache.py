"""LMCache: its server in a process of its own, its multi-process connector in vLLM, all on this machine.

The connector that runs inside vLLM does not run on CPU. Of the two ways that do, this is the faster: the
server copies from and to vLLM's KV cache, which both have in shared memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.engine_speed.engines import BLOCK
from benchmarks.peers.environments import Recipe, prepared
from benchmarks.peers.remote_engine import RemoteEngine, Served, engine_beside
from benchmarks.peers.servers import HOST, free_ports

RECIPE = Recipe(
    name="lmcache",
    packages=(
        "lmcache==0.5.6",
        "aiofile==3.12.3",
        "aiofiles==25.1.0",
        "caio==0.12.10",
        "nvtx==0.2.17",
        "opentelemetry-exporter-prometheus==0.66b2",
        "redis==8.1.0",
        "sortedcontainers==2.4.0",
    ),
)
_MODE = "lmcache_driven"
_HOLDS_GB = 1
_QUIET = {
    "LMCACHE_DISABLE_BANNER": "1",
    "LMCACHE_LOG_LEVEL": "WARNING",
    "LMCACHE_TRACK_USAGE": "false",
}


@contextmanager
def opened(model: Path, folder: Path) -> Iterator[RemoteEngine]:
    """An engine beside its server; raises ``PeerUnavailable``."""
    environment = prepared(RECIPE)
    variables = environment.variables({**_QUIET, "LMCACHE_MP_TRANSFER_MODE": _MODE})
    port, http_port = free_ports(2)
    server = [
        str(environment.program("lmcache")), "server", "--host", HOST, "--port", str(port),
        "--http-host", HOST, "--http-port", str(http_port),
        "--chunk-size", str(BLOCK), "--l1-size-gb", str(_HOLDS_GB), "--l1-init-size-gb", str(_HOLDS_GB),
        "--eviction-policy", "LRU", "--supported-transfer-mode", _MODE, "--disable-observability",
    ]  # fmt: skip
    config = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": f"tcp://{HOST}", "lmcache.mp.port": port},
    }
    served = Served(config=config, server=server, port=port, environment=environment, variables=variables)
    with engine_beside(served, model, folder) as engine:
        yield engine
