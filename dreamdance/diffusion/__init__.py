"""Noise, guidance and dropped conditions of both stages. Knows nothing of networks, data or recipes."""
