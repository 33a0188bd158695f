"""Noise, guidance and dropped conditions of both stages. This package knows no networks, data or recipes."""
