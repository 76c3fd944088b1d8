"""Scores of generated pictures: feature networks, and metrics that take features and know nothing of networks.

`pictures` reads a batch in pieces, `networks` turns pictures into features, `frechet`, `inception_score` and
`precision_recall` turn features into numbers. Only the TensorFlow network in `networks` needs TensorFlow.
"""
