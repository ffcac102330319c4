"""Memory on a server, over HTTP: `AgentMemory(base_url=...)` and `AsyncAgentMemory`."""
