"""The one table of modalities: the kinds of aligned pictures that a clip has for each of its frames.

The table contains only names and numbers and needs no torch, so that recipes, models and data can all import it.
`media.transforms` (tensors) and `data.shards.columns` (stored frames) process the pixels of each kind. A new control
map needs an entry here and a source: a video `<clip>.<name>.mp4` beside the pictures, or the rendered dancers
(`data.writing.dancer_clips`).
"""

from dataclasses import dataclass
from typing import Literal

# The meaning of a modality's pixels decides how they are resized and flipped:
# - colours: resized and mirrored as pictures;
# - drawing: resized as pictures; a flip draws it again, because its colours distinguish left from right;
# - normals: (n+1)/2, resized as vectors and brought back to unit length; a flip also negates x;
# - values: one number per pixel, resized and mirrored as pictures;
# - region: 0 or 1 per pixel, rounded after resizing.
Kind = Literal["colours", "drawing", "normals", "values", "region"]


@dataclass(frozen=True)
class Modality:
    """One kind of aligned pictures. In a batch each map is `b f 3 H W` in [0,1]; grids show it unchanged.

    Attributes:
        name: the name in recipes, batches and messages; also the column in the shards and a part of video file names.
        kind: the meaning of the pixels.
        channels: number of channels of a stored frame: 3 for `(H, W, 3)`, 1 for `(H, W)`.
        bits: number of bits of a stored value.
        domain: whether stage 1 predicts it (Eq. 3). The training of stage 2 then blurs it to stage 1's resolution.
        control: whether `model.controls` of stage 2 may name it (Eq. 7).
        background: the colour that fills the transparent parts of an input picture of this modality.
    """

    name: str
    kind: Kind
    channels: Literal[1, 3] = 3
    bits: Literal[8, 16] = 8
    domain: bool = False
    control: bool = False
    background: tuple[int, int, int] = (0, 0, 0)


MODALITIES: dict[str, Modality] = {
    modality.name: modality
    for modality in (
        Modality("rgb", "colours", domain=True, background=(255, 255, 255)),
        Modality("pose", "drawing", control=True),
        # The background is a wall that faces the camera.
        Modality("normal", "normals", domain=True, control=True, background=(128, 128, 255)),
        Modality("depth", "values", channels=1, bits=16, domain=True, control=True),
        Modality("mask", "region", channels=1, control=True),
    )
}

# The modalities that stage 1 predicts, in the order of contract C1.
DOMAINS = tuple(name for name, modality in MODALITIES.items() if modality.domain)
# The modalities that `model.controls` of stage 2 may name.
CONTROLS = tuple(name for name, modality in MODALITIES.items() if modality.control)
# The controls that `animate` needs as videos: neither stage 1 nor the pose drawing produces them.
GIVEN_CONTROLS = tuple(name for name in CONTROLS if name not in DOMAINS and MODALITIES[name].kind != "drawing")
# The modalities that every training clip has; a clip may lack the others.
ALWAYS_READ = ("rgb", "pose")
OPTIONAL = tuple(name for name in MODALITIES if name not in ALWAYS_READ)
# The maps that rendered dancers have besides the first ones (rgb, pose, normal, depth, mask). Only these names enter
# the settings of `prepare`'s output: while there are none, outputs of older commits count as complete.
ADDED_TO_DANCERS: tuple[str, ...] = ()
