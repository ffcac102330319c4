"""Finding memories: pooled keys, the FAISS index that follows the catalog, and ranking."""
