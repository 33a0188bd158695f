"""DreamDance: animating human images by enriching 3D geometry cues from 2D poses (arXiv 2412.00397)."""

__version__ = "0.1.0"  # and in setup.cfg, which cannot read it while pyproject.toml finds the packages
