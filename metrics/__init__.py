"""Scores of generated pictures: what reads them, what turns them into features, and what turns features into numbers.

`pictures` (with `npz`) reads a batch in pieces, `networks` turns pictures into features, `features` does that for a whole
batch, on any number of processes, and keeps the result. Each score has its module (`frechet`, `inception_score`,
`precision_recall`, `kernel_distance`, `density_coverage`), which knows features alone; `scores` computes all, `bootstrap` their
intervals. `reference` writes reference batches, `record` says how numbers came about, `report` shows them.
"""
