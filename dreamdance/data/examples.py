"""Writes example inputs for `animate`: reference and poses of each validation clip, and a manifest that lists them."""

import json
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from dreamdance.data.loading.stored_clip import ReferenceFrame, StoredClip, fixed_reference
from dreamdance.data.loading.stored_clips import StoredClips
from dreamdance.data.shards.index import read_index
from dreamdance.data.shards.mds import INDEX_FILE
from dreamdance.media.keypoints import KeypointSequence, write_keypoint_file
from dreamdance.media.video import write_video
from dreamdance.recipe.sections import Shards
from dreamdance.runs.files import write_atomically
from dreamdance.runs.layout import EXAMPLE_FIELDS
from dreamdance.runtime.ranks import Ranks

MANIFEST_FILE = "manifest.jsonl"
EXAMPLES_FOLDER = "examples"


def write_examples(output: Path, *, before_clip: Callable[[str], None]) -> int:
    """Writes the reference and the poses of each validation clip, then the manifest. Without clips it is empty.

    The reference is that of `data.loading.stored_clip.fixed_reference`, which validation uses too.

    Args:
        output: the folder that contains `validation`.
        before_clip: called before each clip with a text that contains its number.

    Returns:
        The number of clips.
    """
    manifest, index = output / MANIFEST_FILE, output / "validation" / INDEX_FILE
    num_clips = read_index(index, may_be_empty=True).num_samples
    if manifest.exists() and manifest.stat().st_mtime_ns >= index.stat().st_mtime_ns and _named_files_exist(manifest):
        return num_clips
    lines = []
    if num_clips > 0:
        clips = StoredClips(Shards(local=str(output / "validation")), verify="size", ranks=Ranks())
        for number in range(num_clips):
            before_clip(f"clip {number} of {num_clips}")
            lines.append(json.dumps(_write_example(clips.clip(number), number, output)) + "\n")
    write_atomically(manifest, "".join(lines))
    return num_clips


def _write_example(clip: StoredClip, number: int, output: Path) -> dict[str, str | int | float]:
    """Writes the reference and the poses of a clip; returns its entry in the manifest.

    A reference that is stored beside the clip has no number in the clip; the evaluation finds it by itself.
    """
    folder = Path(EXAMPLES_FOLDER) / clip.clip_id
    (output / folder).mkdir(parents=True, exist_ok=True)
    reference = fixed_reference(clip)
    Image.fromarray(clip.reference_picture(reference)).save(output / folder / "reference.png")
    return {
        "id": clip.clip_id,
        "image": str(folder / "reference.png"),
        **_write_poses(clip, output, folder),
        **_write_reference_pose(clip, reference, output, folder),
        "seed": number,
        "align": False,
        "fps": clip.fps,
        **({"reference_frame": reference.number} if reference.subject == "clip" else {}),
    }


def _write_reference_pose(clip: StoredClip, reference: ReferenceFrame, output: Path, folder: Path) -> dict[str, str]:
    """Writes the pose of a reference that is no frame of the clip; returns the manifest field, if there is a pose."""
    if reference.subject == "clip":
        return {}
    if clip.has_keypoints_of("references"):
        keypoints = clip.keypoints_of([reference.number], subject="references")
        sequence = KeypointSequence(keypoints, width=clip.width, height=clip.height, fps=clip.fps)
        write_keypoint_file(output / folder / "reference_keypoints.json", sequence)
        return {"reference_keypoints": str(folder / "reference_keypoints.json")}
    if not clip.has("pose", "references"):
        return {}
    drawing = clip.frames("pose", [reference.number], subject="references")[0]
    Image.fromarray(drawing).save(output / folder / "reference_pose.png")
    return {"reference_pose": str(folder / "reference_pose.png")}


def _named_files_exist(manifest: Path) -> bool:
    entries = [json.loads(line) for line in manifest.read_text(encoding="utf-8").split("\n") if line]
    named = [entry[field] for entry in entries for field in EXAMPLE_FIELDS if field in entry]
    return all((manifest.parent / path).is_file() for path in named)


def _write_poses(clip: StoredClip, output: Path, folder: Path) -> dict[str, str]:
    """Writes the key points, or, without key points, the drawings as a lossless video; returns the manifest field."""
    if clip.keypoints is not None:
        sequence = KeypointSequence(clip.keypoints, width=clip.width, height=clip.height, fps=clip.fps)
        write_keypoint_file(output / folder / "keypoints.json", sequence)
        return {"keypoints": str(folder / "keypoints.json")}
    write_video(output / folder / "pose.mkv", clip.frames("pose"), fps=clip.fps, lossless=True)
    return {"pose": str(folder / "pose.mkv")}
