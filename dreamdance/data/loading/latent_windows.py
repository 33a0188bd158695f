"""The stored latents of a training window."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamdance.data.loading.stored_clip import Window
from dreamdance.data.shards.latents import EMBEDDING, PREFIX, REFERENCE, LatentClip
from dreamdance.modalities import MODALITIES


def read_latents(stored: LatentClip, window: Window, names: Sequence[str]) -> dict[str, Tensor]:
    """Reads latents of a window, each under its name with `PREFIX`, float32.

    Args:
        stored: the latents of the window's clip.
        window: frames, reference, and whether they are mirrored.
        names: modalities, whose moments are `f 2 c h w`, those of the reference first if `window.reference_first`;
            `REFERENCE`, `c h w`; `EMBEDDING`, `c`.

    Raises:
        ShardError: the latents do not contain what is asked for, or are damaged.
    """
    found, subject, number = dict[str, Tensor](), window.reference.subject, window.reference.number
    for name in names:
        if name in MODALITIES:
            moments = stored.moments(name, window.frames, mirrored=window.flip)
            if window.reference_first:
                first = stored.moments(name, [number], subject=subject, mirrored=window.flip)
                moments = torch.cat([first, moments])
            found[PREFIX + name] = moments
        elif name == REFERENCE:
            found[PREFIX + name] = stored.means("rgb", [number], subject=subject, mirrored=window.flip)[0]
        elif name == EMBEDDING:
            found[PREFIX + name] = stored.embeddings([number], subject=subject, mirrored=window.flip)[0]
        else:
            raise ValueError(f"{name!r} are no latents; accepted are modalities, '{REFERENCE}' and '{EMBEDDING}'")
    return found
