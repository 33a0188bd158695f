"""Makes the maps of plain videos for `prepare`: shots, key points of one person, mask, depth and normals, scores.

Every stage keeps its result in a side file, so that no stage is repeated after a kill or a change of later stages.
"""
