"""The only module that imports mosaicml-streaming; all other modules import its names from here.

The library imports torchvision for datasets that we do not use. If torchvision is missing or broken (the CUDA wheel
beside a CPU torch), empty modules replace three of the library's subpackages during the import; otherwise nothing is
replaced.
"""

import importlib
import sys
import types

_NEEDS_TORCHVISION = ("streaming.vision", "streaming.text", "streaming.multimodal")


def _torchvision_works() -> bool:
    try:
        importlib.import_module("torchvision")
    except (ImportError, RuntimeError):  # RuntimeError: "operator torchvision::nms does not exist"
        return False
    return True


def _import_streaming() -> types.ModuleType:
    if "streaming" in sys.modules or _torchvision_works():
        return importlib.import_module("streaming")
    stand_ins = {name: types.ModuleType(name) for name in _NEEDS_TORCHVISION}
    sys.modules.update(stand_ins)
    try:
        return importlib.import_module("streaming")
    finally:
        # A later `import streaming.vision` must fail with torchvision's own error, not find an empty module.
        for name in stand_ins:
            del sys.modules[name]


_import_streaming()

from streaming import MDSWriter, Stream, StreamingDataset  # noqa: E402
from streaming.base.compression import decompress  # noqa: E402
from streaming.base.format import get_index_basename  # noqa: E402
from streaming.base.hashing import get_hash  # noqa: E402
from streaming.base.spanner import Spanner  # noqa: E402
from streaming.base.storage.download import CloudDownloader  # noqa: E402
from streaming.base.world import World  # noqa: E402

INDEX_FILE: str = get_index_basename()

__all__ = [
    "INDEX_FILE",
    "CloudDownloader",
    "MDSWriter",
    "Spanner",
    "Stream",
    "StreamingDataset",
    "World",
    "decompress",
    "get_hash",
]
