"""How memory talks to an engine."""
