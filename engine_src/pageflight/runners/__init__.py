"""Runners: what executes step plans."""
