"""Cases of the benchmark `cli`."""
