"""What the project claims about time, measured: `python -m benchmarks.run CASE... --out benchmarks/results/`."""
