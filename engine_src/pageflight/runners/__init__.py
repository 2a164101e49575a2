"""Runners: what executes step plans. Rows and block tables are mirrored from the plans' differences."""
