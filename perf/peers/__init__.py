"""Drivers of other engines: the same workloads, the same figures."""
