"""The memory routes as an endpoint plugin of vLLM's API server, loaded where VLLM_PLUGINS names it."""

from __future__ import annotations

import asyncio
import logging
import os
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from prometheus_client import REGISTRY
from starlette.datastructures import State
from vllm import envs
from vllm.renderers.chat_utils import load_chat_template

from kv_agent.config import PluginConfig, parse
from kv_agent.engines.vllm_calls import CONNECTOR, PLUGIN_KEY
from kv_agent.engines.vllm_served import ServedEngine
from kv_agent.errors import ConfigError
from kv_agent.serving import routes, routing
from kv_agent.serving.access import KEYS_ENV
from kv_agent.serving.chat import ChatMemory, RememberingClient
from kv_agent.serving.server import MemoryServer

logger = logging.getLogger(__name__)


# What answers chats, completions and responses; absent where the model or the options do not allow one.
CHAT_SERVICES = ("openai_serving_chat", "openai_serving_completion", "openai_serving_responses")


class MemoryEndpoints:
    """What the entry point ``kv_agent`` of ``vllm.endpoint_plugins`` makes."""

    name = "kv_agent"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        app.include_router(routes.router)
        app.include_router(APIRouter(lifespan=_closing))
        app.add_middleware(ChatMemory, server_of=_server_of)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Open the store of the connector beside the engine; without our connector the routes answer 503."""
        transfer = None if engine_client is None else engine_client.vllm_config.kv_transfer_config
        if transfer is None or transfer.kv_connector != CONNECTOR:
            logger.warning(
                "memory is off: vLLM runs without %s, see --kv-transfer-config",
                CONNECTOR,
                extra={"event": "memory_off"},
            )
            return
        settings = parse(PluginConfig, transfer.kv_connector_extra_config.get(PLUGIN_KEY), "settings")
        keys = os.environ.get(KEYS_ENV)
        server = await MemoryServer.open(
            partial(
                ServedEngine,
                engine_client,
                asyncio.get_running_loop(),
                load_chat_template(args.chat_template),
            ),
            settings,
            keys=Path(keys).expanduser() if keys else None,
            server_keys=[key for key in args.api_key or [envs.VLLM_API_KEY] if key],
            registry=REGISTRY,
        )
        setattr(state, routing.STATE, server)
        try:
            server.service.manager.prompts.prefix()
        except ConfigError as err:
            logger.warning("chats get no memories: %s", err, extra={"event": "chats_off"})
        for name in CHAT_SERVICES:
            if (service := getattr(state, name, None)) is not None:
                service.engine_client = RememberingClient(engine_client, server)
        about = {"event": "memory_on", "store": str(settings.store)}
        logger.info("memory is on: /memory/* with the store %s", settings.store, extra=about)


def _server_of(app: FastAPI) -> MemoryServer | None:
    return getattr(app.state, routing.STATE, None)


@asynccontextmanager
async def _closing(app: FastAPI) -> AsyncIterator[None]:
    yield
    server: MemoryServer | None = getattr(app.state, routing.STATE, None)
    if server is not None:
        await server.close()
