"""What a user can mend.

Every error here is printed as its text alone, without a traceback, and ends the command with a code that is not 0.
"""

import errno

USER_FIXABLE_ERRNOS = frozenset(
    {
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP),
        *(errno.EACCES, errno.EPERM, errno.EROFS),
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        *(errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP),
    }
)
"""What the system says where a path, a right, room or a file system is the user's to mend. Whatever else it says (EIO,
ESTALE, ETIMEDOUT, ENOTCONN, ...) tells of a machine or of storage that stumbles."""


class UserError(ValueError):
    """Something that the user gave is wrong: the text names the value, what is accepted and the key to change."""


class RecipeError(UserError):
    """A recipe, or a `key=value` on the command line, is wrong."""


class ShardError(UserError):
    """A shard or its index is damaged, missing, foreign or hostile."""


class LostWorkerError(ShardError):
    """A process that reads or writes shards died or hangs; another start, perhaps elsewhere, may fare better."""


class LostDeviceError(UserError):
    """A GPU that the job asked for is not there; another start, perhaps elsewhere, may fare better."""


class CheckpointError(UserError):
    """A checkpoint or an export cannot be used."""


class ManifestError(UserError):
    """An entry of an inference manifest is wrong."""


class MissingInputError(UserError):
    """Weights, data, a run or a device that the recipe names is not there."""


def is_transient(error: BaseException) -> bool:
    """Whether another start may fare better though nobody changes anything: a machine failed, or its storage.

    A `UserError` often says in the project's words what a file operation met, so what it follows from is judged too.
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, LostWorkerError | LostDeviceError):
            return True
        if isinstance(seen, OSError):
            return seen.errno is not None and seen.errno not in USER_FIXABLE_ERRNOS
        seen = seen.__cause__ or seen.__context__
    return False
