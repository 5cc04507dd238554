"""What bench_scaling.py times, and what it makes of the times."""
