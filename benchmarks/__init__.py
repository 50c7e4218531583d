"""Paired speed and memory comparisons of seqkern with its peers; `python -m benchmarks --help`."""
