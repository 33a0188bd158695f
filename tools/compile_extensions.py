"""Compiles DeepSpeed's shared-memory operation ahead of the first run, into TORCH_EXTENSIONS_DIR.

A build that was killed leaves a `lock` file beside which every later start waits for ever: a stale one is removed
first.
"""

import logging
import os
import sys
from pathlib import Path


def main() -> int:
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    for lock in folder.glob("**/lock"):
        lock.unlink()
    logging.disable(logging.WARNING)
    import torch

    if torch.cuda.is_available():
        return 0  # NCCL needs nothing compiled

    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load(verbose=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
