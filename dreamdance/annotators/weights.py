"""Files of weights: which file a network needs, its licence and hash, and where to get it."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from dreamdance.errors import MissingInputError


@dataclass(frozen=True)
class NetworkFile:
    """One file of a network's weights.

    Attributes:
        network: name of the network, for messages and metadata.
        file: path within the folder of weights.
        licence: licence of the weights, as their authors state it.
        source: where to get the file.
        sha256: the hash that the file must have; None if its authors publish none. After `find_network_file` it is
            the hash that the file has.
        is_pinned: after `find_network_file`, whether the file had to have that hash; if not, any file of that name is
            taken.
    """

    network: str
    file: str
    licence: str
    source: str
    sha256: str | None = None
    is_pinned: bool = False


def find_network_file(folder: Path | str, wanted: NetworkFile) -> tuple[Path, NetworkFile]:
    """Finds a file of weights and checks its hash.

    Args:
        folder: the folder of weights that the recipe names.
        wanted: the file.

    Returns:
        Its path, and `wanted` with the file's hash, and whether that was known before.

    Raises:
        MissingInputError: there is no such file, or it has another hash; the error says where to get it.
    """
    path = Path(folder) / wanted.file
    if not path.is_file():
        raise MissingInputError(
            f"{path}: the weights of {wanted.network} are missing (licence: {wanted.licence}); get them from "
            f"{wanted.source}"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if wanted.sha256 not in (None, found):
        raise MissingInputError(
            f"{path}: SHA-256 {found}, but the weights of {wanted.network} have {wanted.sha256}; the file is damaged "
            f"or of another version, get it from {wanted.source}"
        )
    return path, replace(wanted, sha256=found, is_pinned=wanted.sha256 is not None)
