"""Which cells and genes there are: sources, the corpus on disk, its labels, subsets and their diversity.

Serves notebook 1. May import `engine`.
"""
