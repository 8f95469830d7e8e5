"""What the toolkit costs; each module prints one JSON line last: `python -m tests.benchmarks.policy_overhead`."""
