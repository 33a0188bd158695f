"""Trivial answers, which need no model; a useful result must be better than all of them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from einops import repeat
from numpy.typing import NDArray

from dreamdance.evaluation.clips import Prediction, Size, Truth, open_clips, read_truth
from dreamdance.evaluation.image_metrics import mean_colour
from dreamdance.recipe.sections import Shards

REPEATED_REFERENCE = "reference repeated"
MEAN_COLOUR = "reference's mean body colour"
MEAN_COLOUR_OF_FRAME = "reference's mean colour"
MEAN_OF_TRAINING = "training set's mean"
FACING_CAMERA = "normals that face the camera"

# The training set's mean is taken over about this many clips, and up to this many frames of each.
MAX_TRAINING_CLIPS = 256
FRAMES_PER_TRAINING_CLIP = 8


@dataclass(frozen=True)
class TrainingMean:
    """Mean pictures of a training set.

    Attributes:
        pictures: one frame of each kind; normals are averaged as vectors, then normalised.
        num_clips: number of clips in the mean.
    """

    pictures: Prediction
    num_clips: int


def trivial_answers(reference: Truth, num_frames: int, training_mean: TrainingMean | None) -> dict[str, Prediction]:
    """Predictions of a clip from its reference frame alone, or from the training set alone.

    Args:
        reference: the clip's reference frame with its true maps, a `Truth` of one frame.
        num_frames: number of frames of the clip.
        training_mean: None if the recipe names no training set.
    """
    colour_name = MEAN_COLOUR_OF_FRAME if reference.frame_mask is None else MEAN_COLOUR
    answers = {
        REPEATED_REFERENCE: _repeated(reference.pictures, num_frames),
        colour_name: Prediction(frames=_colour_frames(reference, num_frames)),
    }
    normals = reference.pictures.normals
    if normals is not None:
        facing = np.asarray((0.0, 0.0, 1.0), np.float32)
        answers[FACING_CAMERA] = Prediction(normals=np.broadcast_to(facing, (num_frames, *normals.shape[1:])))
    if training_mean is not None:
        answers[MEAN_OF_TRAINING] = _repeated(training_mean.pictures, num_frames)
    return answers


def average_training_set(
    shards: Shards, *, frame_size: Size, map_size: Size, before_clip: Callable[[str], None] | None = None
) -> TrainingMean:
    """Averages evenly spaced frames of evenly spaced clips of a training set.

    Args:
        shards: the training set.
        frame_size: size of the result's frames.
        map_size: size of the result's maps.
        before_clip: called before each shard is checked, and before each clip is read, with a text that contains its
            number.

    Raises:
        ShardError: the shards cannot be read.
    """
    clips = open_clips(shards, before_shard=before_clip)
    stride = max(1, len(clips) // MAX_TRAINING_CLIPS)
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    chosen_clips = range(0, len(clips), stride)
    for number in chosen_clips:
        if before_clip is not None:
            before_clip(f"clip {number} of {len(clips)}")
        clip = clips.clip(number)
        count = min(FRAMES_PER_TRAINING_CLIP, clip.num_frames)
        chosen = np.linspace(0, clip.num_frames - 1, count).round().astype(int).tolist()
        truth = read_truth(clip, frame_size=frame_size, map_size=map_size, frames=chosen)
        for name in ("frames", "normals", "disparity"):
            part = getattr(truth.pictures, name)
            if part is not None:
                sums[name] = sums.get(name, 0.0) + part.sum(axis=0, dtype=np.float64)
                counts[name] = counts.get(name, 0) + len(part)
    means = {name: (total / counts[name]).astype(np.float32)[None] for name, total in sums.items()}
    if "normals" in means:
        means["normals"] /= np.maximum(np.linalg.norm(means["normals"], axis=-1, keepdims=True), 1e-6)
    return TrainingMean(Prediction(**means), len(chosen_clips))


def _repeated(one: Prediction, num_frames: int) -> Prediction:
    parts = (one.frames, one.normals, one.disparity)
    return Prediction(*(None if part is None else repeat(part, "1 ... -> f ...", f=num_frames) for part in parts))


def _colour_frames(reference: Truth, num_frames: int) -> NDArray[np.float32]:
    """Frames of one colour: the mean colour of the reference's body, or of the whole picture if there is no mask."""
    frames = reference.pictures.frames
    assert frames is not None, "every stored clip has rgb"
    colour = mean_colour(frames, reference.frame_mask).astype(np.float32)
    return repeat(colour, "c -> f h w c", f=num_frames, h=frames.shape[1], w=frames.shape[2])
