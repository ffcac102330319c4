"""Parts of ``benchmarks.storage``: each measures one way of the bytes and gives rows."""
