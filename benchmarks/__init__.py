"""What `benchmark.py` measures: candidate and baseline in one process, interleaved, warmed up, synchronised."""
