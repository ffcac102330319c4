"""The vLLM plugin: a KV connector that captures, probes and re-injects."""
