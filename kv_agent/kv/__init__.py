"""Pure tensor functions on KV: rotary position embedding and block layouts."""
