"""Memory over HTTP, as routes on vLLM's own API server. Nothing here imports vLLM."""
