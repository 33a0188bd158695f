"""Annotators: networks and geometry that make poses, masks, depths and normals from the frames of a video.

One module per annotator, behind the protocols of `protocols`. They know neither recipes, shards nor ranks.
"""
