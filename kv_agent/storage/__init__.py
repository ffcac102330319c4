"""Where chunks live: blob files, the SQLite catalog, the host cache and the background writer."""
