"""vLLM's API server, run by this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from kv_agent.errors import EngineError


def run_api_server(arguments: Sequence[str]) -> None:
    """Serve until a signal ends it, with these command line arguments; raises :class:`EngineError`.

    What `python -m vllm.entrypoints.openai.api_server` runs, which also works where the `vllm` command does
    not: that of the CPU distribution looks for a distribution of another name.
    """
    try:
        from vllm.entrypoints.launchers.api_server.entry import main
    except ImportError as err:
        raise EngineError(f"vLLM 0.32 or newer is needed to serve; install kv-agent[vllm] ({err})") from err
    sys.argv = ["kv-agent serve", *arguments]  # where vLLM looks for them
    main()
