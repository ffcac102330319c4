"""Where chunks live: blob files, the SQLite catalog, copies in memory and the background writer."""
