"""How well memories are found: corpora, metrics and the methods that are compared."""
