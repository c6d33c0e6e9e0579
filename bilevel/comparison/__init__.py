"""Comparison of runs: read their files, draw curves over seeds, test differences, write a report.

`bilevel-compare` is the command line. `runs` reads runs and `labels` names their groups. `curves`,
`statistics` and `table` compute; `curve_plots`, `plot_style` and `figures` draw. `html_page` and
`report` write the page.
"""
