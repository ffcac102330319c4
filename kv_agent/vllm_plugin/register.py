"""The ``vllm.general_plugins`` entry point: makes ``KVAgentConnector`` known to vLLM by name."""

from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

CONNECTOR_NAME = "KVAgentConnector"


def register() -> None:
    """Register the connector; calling it again is harmless."""
    if CONNECTOR_NAME not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(
            CONNECTOR_NAME, "kv_agent.vllm_plugin.connector", CONNECTOR_NAME
        )
