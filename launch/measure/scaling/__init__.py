"""Scaling sweeps: the throughput of DP-SGD and of plain SGD over node counts, and what the curves say."""
