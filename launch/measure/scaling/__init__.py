"""Scaling sweeps: measure the throughput of DP-SGD and plain SGD over node counts, and report it."""
