"""What tools/benchmark.py measures, one duty a file."""
