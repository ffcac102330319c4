"""Other stores that keep KV outside vLLM, as arms beside ours.

Each runs as its makers meant it: with its own packages, its own servers and its own connector in a stock
vLLM. A peer that cannot run on a machine is left out, and the result says why.
"""
