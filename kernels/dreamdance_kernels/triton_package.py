"""Whether the Triton that is installed compiles this package's kernels, and whether this machine lets it start them."""

import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path

OLDEST = (3, 6)  # the oldest version that the kernels were compiled with


def why_unusable() -> str | None:
    """The reason why the installed Triton cannot compile the kernels; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    import triton  # here, because it is optional

    major, minor, *_ = triton.__version__.split(".")
    if (int(major), int(minor)) < OLDEST:
        return f"it needs triton {OLDEST[0]}.{OLDEST[1]} or newer (it comes with torch); found {triton.__version__}"
    return None


def why_unable_to_start() -> str | None:
    """The reason why Triton cannot start a compiled kernel on this machine; None if it can.

    Triton starts a kernel through a small C module that it builds at first use with the C compiler that the environment
    variable CC names, or gcc or clang on PATH, and with Python's headers (triton/runtime/build.py). torch.compile needs
    the same.
    """
    from triton import knobs

    if knobs.build.impl is not None:  # the caller has replaced the way to build it
        return None
    compiler = os.environ.get("CC")
    if compiler is not None and shutil.which(compiler) is None:
        return f"it needs a C compiler, and there is none at {compiler!r}, which the environment's CC names"
    if compiler is None and shutil.which("gcc") is None and shutil.which("clang") is None:
        return (
            "it needs a C compiler, and neither gcc nor clang is on PATH "
            "(apt-get install gcc libc6-dev, or name one in the environment's CC)"
        )
    return why_no_headers()


def why_no_headers() -> str | None:
    """The reason why no C module for this Python can be built here, if that is a lack of headers; None if it is not."""
    scheme = sysconfig.get_default_scheme()
    headers = Path(sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)["include"])
    if not (headers / "Python.h").is_file():
        return f"it needs Python's headers, and there is no {headers}/Python.h (apt-get install python3-dev)"
    return None
