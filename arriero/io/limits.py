"""The system's limit of open files, and the remedy to give where it refuses one."""

from __future__ import annotations

import errno
from contextlib import suppress

FEW = 256  # open files, where the system does not say: a Mac's default
MANY = (2**16, 10_240)  # open files to ask for; the second is the most that some Macs give
FULL = (errno.ENOSPC, errno.EDQUOT)
TOO_MANY = (errno.EMFILE, errno.ENFILE)
BROKEN = (errno.EIO, errno.ESTALE)
NAMELESS = FULL + TOO_MANY + BROKEN  # what may come without a file's name, and is no mistake of ours
_REMEDIES = {
    **dict.fromkeys(FULL, "free disk space, or write elsewhere"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "change its permissions, or give another path"),
    **dict.fromkeys(TOO_MANY, "let the process have more of them (ulimit -n 65536), or give fewer --workers"),
    **dict.fromkeys(BROKEN, "the disk, or the server that it is on, fails: copy the file elsewhere, or fetch it again"),
    errno.ENOTDIR: "a part of the path is a file; give another path",
    errno.EISDIR: "give a file",
    errno.ENAMETOOLONG: "a file system takes 255 bytes in a name; give a shorter one",
    errno.ELOOP: "the link leads to itself; remove it, or give another path",
}


def remedy(error: OSError) -> str:
    """What the user can do about an error of the system."""
    return _REMEDIES.get(error.errno or 0, "check the path")


def open_files() -> int:
    """Files that this process may hold open (`ulimit -n`)."""
    try:
        import resource
    except ImportError:  # Windows
        return FEW
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MANY[0] if soft == resource.RLIM_INFINITY else soft


def raise_open_files() -> None:
    """Ask the system for more open files where this user may have them; processes started from here inherit that."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in MANY:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if soft == resource.RLIM_INFINITY or soft >= most:
            return
        with suppress(ValueError, OSError):  # a hard limit that the system does not keep to
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
            return
