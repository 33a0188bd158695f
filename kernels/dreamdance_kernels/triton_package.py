"""Whether the Triton that is installed compiles this package's kernels."""

import importlib.util

OLDEST = (3, 6)  # the oldest that they were compiled with


def why_unusable() -> str | None:
    """Why the installed Triton will not do, or None where it will."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import triton  # here, because it need not be there

    major, minor, *_ = triton.__version__.split(".")
    if (int(major), int(minor)) < OLDEST:
        return f"it needs triton {OLDEST[0]}.{OLDEST[1]} or newer (it comes with torch); found {triton.__version__}"
    return None
