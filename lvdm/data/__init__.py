"""From shards anywhere to typed batches: index -> order -> fetch -> decode -> transforms -> loader.

Knows no model. Every choice about a sample is a pure function of (seed, position of the sample in the run).
"""
