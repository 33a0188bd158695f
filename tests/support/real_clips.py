"""Real dance videos, which are no part of the project: tests that need them are skipped where they are not."""

import os
from pathlib import Path

import pytest

CLIPS = Path(os.environ.get("DREAMDANCE_CLIPS", Path(__file__).parents[2].parent / "shared" / "clips"))


def needs_clips(*names: str) -> pytest.MarkDecorator:
    """Skips a test that reads `<name>.rgb.mp4` of these names where one of them is missing."""
    lacks = [name for name in names if not (CLIPS / f"{name}.rgb.mp4").is_file()]
    reason = f"no {', '.join(lacks)} in {CLIPS}; name their folder by DREAMDANCE_CLIPS"
    return pytest.mark.skipif(bool(lacks), reason=reason)
