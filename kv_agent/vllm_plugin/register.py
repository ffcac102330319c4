"""The ``vllm.general_plugins`` entry point: makes ``KVAgentConnector`` known to vLLM by name."""

import logging
import os

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from kv_agent.machine import own_cpus
from kv_agent.vllm_plugin.signing import make_key

CONNECTOR_NAME = "KVAgentConnector"
PLUGIN_NAME = "kv_agent"  # the name of both entry points


def register() -> None:
    """Register the connector; calling it again is harmless.

    Where the memory routes are loaded, too, which is where VLLM_PLUGINS names us, requests of others must not
    reach the plugin: the server process makes the key here before it starts the engine. There, and in the
    engine's process, our log goes where vLLM's goes.
    """
    own_cpus()  # before vLLM binds its threads to some of them
    if PLUGIN_NAME in os.environ.get("VLLM_PLUGINS", "").split(","):
        make_key()
        _log_with_vllm()
    if CONNECTOR_NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            CONNECTOR_NAME, "kv_agent.vllm_plugin.connector", CONNECTOR_NAME
        )


def _log_with_vllm() -> None:
    """Pass our records on to vLLM's logger, whatever its handlers and level are then or later.

    Else nobody would see them. Whoever gave our logger handlers decided otherwise.
    """
    ours = logging.getLogger(PLUGIN_NAME)
    if not ours.handlers:
        ours.parent = logging.getLogger("vllm")
