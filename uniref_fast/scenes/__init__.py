"""Synthetic scenes: a generator of multi-reference editing data, and the search for its objects in an image."""
