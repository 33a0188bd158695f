"""Curation: shots, scores, duplicates, crops, and pictures of clips for people to look at.

Each module computes from arrays and files alone; it knows no recipe section but the filters, no rank and no shard.
"""
