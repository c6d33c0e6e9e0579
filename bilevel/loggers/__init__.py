"""Loggers: the records of a run, and the files, dashboards and displays that receive them."""
