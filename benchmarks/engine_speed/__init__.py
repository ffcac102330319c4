"""Speed of a running engine with and without the plugin."""
