"""The sections about the sources of `prepare`: rendered dancers, or a folder of videos."""

from typing import Annotated, Literal

from pydantic import Field

from dreamdance.recipe.annotator_section import Annotators
from dreamdance.recipe.sections import (
    Clips,
    Fraction,
    Frames,
    NonNegative,
    Pixels,
    Positive,
    PositiveFloat,
    Section,
    Unit,
)


class DancersSource(Section):
    """Procedural dancers to render (C10). Training and validation identities and motions are disjoint by seed range."""

    num_train_clips: Clips = Field(
        description="Number of dancers rendered for training, each with its own person and motion.",
    )
    num_validation_clips: Clips = Field(
        description="Number of dancers rendered for validation; none of them is a training dancer.",
    )
    skip_validation_clips: NonNegative = Field(
        default=0,
        description=(
            "Held-out dancers that are left out before the first one of validation. With 12, the thirteenth is the "
            "first: settings that were chosen on twelve people are measured on others."
        ),
    )
    num_frames: Frames = Field(
        default=16,
        description="Frames of each rendered clip, at least as many as a training window has.",
    )
    width: Pixels = Field(default=256, description="Width of the rendered frames; best the width of the training.")
    height: Pixels = Field(default=384, description="Height of the rendered frames; best the height of the training.")
    fps: Annotated[PositiveFloat, Unit("frames per second")] = Field(
        default=8.0,
        description=(
            "Frame rate of the clips. The motion is a function of seconds, so a higher rate shows less motion from "
            "frame to frame."
        ),
    )
    references: Annotated[NonNegative, Unit("frames")] = Field(
        default=0,
        description=(
            "Frames of the same dancer at other times that are stored with each clip as possible references, spread "
            "over 360 frames. With 0 the reference is a frame of the clip itself."
        ),
    )
    pairs: bool = Field(
        default=False,
        description=(
            "Whether validation also has each motion on another held-out dancer, with that one's body, clothes and "
            "place: the exact truth of driving one person by the poses of another. `pairs.jsonl` is their manifest."
        ),
    )


class VideosSource(Section):
    """A folder of `<clip>.rgb.mp4` with `<clip>.pose.mp4`, and optional maps, such as `<clip>.normal.mkv`."""

    folder: str = Field(
        description=(
            "Folder of the videos. Hidden files are not videos. With annotators, a subfolder NAME with "
            "NAME/images/*.png is a clip too, with the masks NAME/masks/*.png if they are given (the form of the "
            "TikTok data set); other subfolders are not searched."
        ),
    )
    list: str | None = Field(
        default=None,
        description=(
            "Text file with a name in each line, such as a TikTok video's id or address, or a table (.csv, .tsv) with "
            "these in a column: only these videos of the folder are used. A name is a file's name without its suffix; "
            "# begins a comment. Names without a video are listed in `output`/missing_videos.txt."
        ),
    )
    images_fps: Annotated[PositiveFloat, Unit("frames per second")] = Field(
        default=30.0,
        description="Frame rate of clips that are folders of pictures.",
    )
    annotators: Annotators | None = Field(
        default=None,
        description=(
            "The networks that make the maps of plain videos (`videos.annotators={}` takes the defaults). Without this "
            "section every clip needs its own pose video, and the other maps are read only where they are given."
        ),
    )
    on_error: Literal["stop", "skip"] = Field(
        default="stop",
        description=(
            "What happens to videos that cannot be used. stop: the run ends with a list of them, and the same command "
            "continues after their repair. skip: they are left out as a whole and listed in "
            "`output`/damaged_videos.tsv, and the same command adds them after their repair; all others stay in their "
            "split. A run may continue with the other value."
        ),
    )
    crop: tuple[NonNegative, NonNegative, Positive, Positive] | None = Field(
        default=None,
        description=(
            "Part of the frames that is kept, as [left, top, width, height] in pixels, the same for all videos. It "
            "replaces the search for black bars."
        ),
    )
    crop_letterbox: bool = Field(
        default=True,
        description=(
            "Searches each video for black bars, which are dark in all its frames, and cuts them off. Not used if "
            "crop is given."
        ),
    )
    width: Pixels | None = Field(
        default=None,
        description=(
            "Width of the stored frames, given with height; margins are cut evenly to that aspect. Without both, "
            "frames keep their size."
        ),
    )
    height: Pixels | None = Field(default=None, description="Height of the stored frames, given with width.")
    frame_stride: Annotated[Positive, Unit("frames")] = Field(
        default=1,
        description=(
            "Every n-th frame is kept: 2 halves the frame rate of the clips. Raise it if a training window shows too "
            "little motion."
        ),
    )
    clip_frames: Frames = Field(
        default=64,
        description=(
            "Frames of a stored clip. Training cuts its windows, and draws their references, from one clip: "
            "longer clips give more distant references, and more bytes to read for each sample."
        ),
    )
    min_clip_frames: Frames = Field(
        default=16,
        description=(
            "The remainder of a video is left out if it has fewer frames than this. At most clip_frames; at least as "
            "many as a training window has."
        ),
    )
    references: Annotated[NonNegative, Unit("frames")] = Field(
        default=12,
        description=(
            "Frames that are stored with each clip as possible references, spread over its whole video (with split_by: "
            "time over the part of its split). Without annotators a video counts as one shot of one person: cut videos "
            "with several scenes or people apart first. With 0 the reference is a frame of the clip itself."
        ),
    )
    validation_fraction: Fraction = Field(
        default=0.05,
        description=(
            "Share of the videos, or of each video's frames, that is for validation (see split_by). 0 makes no "
            "validation set."
        ),
    )
    split_by: Literal["clip", "time"] = Field(
        default="clip",
        description=(
            "How validation is divided from training. clip: whole videos, drawn by seed. time: the end of each video, "
            "so that the people are the same."
        ),
    )
