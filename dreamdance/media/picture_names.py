"""Names of the files of clips that are folders of pictures: `NAME/images/*.png`, `NAME/masks/*.png`. No torch here."""

from pathlib import Path

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def find_picture_folders(folder: Path | str) -> list[str]:
    """The names of the subfolders that contain a folder `images`, in alphabetical order; hidden ones are ignored."""
    return sorted(path.parent.name for path in Path(folder).glob("*/images") if path.parent.name[0] != ".")


def list_pictures(folder: Path) -> list[Path]:
    """The files of pictures in a folder, by name; none if there is no folder."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and path.name[0] != ".")


def packed_names(folder: Path | str, name: str) -> list[str]:
    """The names of the videos that `prepare` makes of a clip's pictures."""
    kinds = ("rgb", "mask") if (Path(folder) / name / "masks").is_dir() else ("rgb",)
    return [f"{name}.{kind}.mkv" for kind in kinds]
