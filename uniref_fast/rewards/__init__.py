"""Scores for edited images: a reward for synthetic scenes, a judge behind an endpoint, and functions of the user."""
