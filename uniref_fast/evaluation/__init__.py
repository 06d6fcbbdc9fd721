"""Evaluation of a model on files of rows: edits, metrics, rewards, a report, and comparisons of two evaluations."""
