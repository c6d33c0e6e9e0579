"""Runs compared: reading what they left, curves over seeds, tests between solvers, tables, pictures and a report.

`bilevel-compare` is its command line; the rooms are `runs`, `labels`, `curves`, `statistics`, `curve_plots`, `figures`, `table`,
`page` and `report`.
"""
