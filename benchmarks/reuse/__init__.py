"""How much an answer changes when memories come back as KV instead of being computed again."""
