"""Tells whether a folder is the farm's own, and makes it so: nothing else is written to, followed or removed.

ROOT/.edgemoe-farm is the marker. A folder is the farm's where the marker lies in it as a plain file, and where nobody
but this user may write to it or put another folder into its place. Names alone prove nothing: `runs` is anybody's word.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import sys
from typing import Dict, List, Optional

MARKER = ".edgemoe-farm"
KINDS = ("engines", "sites", "blobs", "runs", "lease")
# Of what the farm makes in its folders; with a second ending where it was cut off, or is about to go.
_HASH, _ASIDE = "[0-9a-f]{16}", r"(\.[0-9]+\.part)?"
FORMS: Dict[str, str] = {
    "engines": _HASH + _ASIDE,
    "sites": _HASH + _ASIDE,
    "blobs": "[0-9a-f]{64}" + _ASIDE,
    "runs": "[A-Za-z0-9_][A-Za-z0-9._-]{0,99}?" + _ASIDE,
}
# What a file system has of its own, and a marker that was cut off.
_NOTHING = re.compile(r"lost\+found|" + re.escape(MARKER) + r"\.[0-9]+\.part")
_MOST_LINKS = 40


class NotOursError(Exception):
    """Says why a folder cannot be used as the farm's: what is wrong, and what helps."""


def prepare(root: str) -> str:
    """Makes the farm's folder unless it is there; returns its absolute path, free of links. Raises NotOursError."""
    path = _resolved(root)
    try:
        found = os.listdir(path)
    except FileNotFoundError:
        _make(path)
        found = []
    except NotADirectoryError:
        raise NotOursError(f"{path} is not a folder: set another `root`") from None
    _check_owner(path)
    if not os.path.lexists(os.path.join(path, MARKER)):
        if not all(_NOTHING.fullmatch(name) for name in found):
            raise NotOursError(
                f"{path} is not empty, and the farm did not make it: set `root` to a folder of its own, or, where an "
                f"older farm made this one, run `touch {path}/{MARKER}` there"
            )
        _mark(path)
    with contextlib.suppress(OSError):  # of a file system without modes
        os.chmod(path, 0o700)
    for kind in KINDS:
        inner = os.path.join(path, kind)
        if not os.path.lexists(inner):
            _make(inner)
    verify(path)
    sync(path)
    return path


def verify(root: str) -> None:
    """Checks that a prepared folder is still the farm's. Raises NotOursError."""
    try:
        if not stat.S_ISREG(os.lstat(os.path.join(root, MARKER)).st_mode):
            raise NotOursError(f"{root}/{MARKER} is not a file: remove it")
    except OSError as error:
        raise NotOursError(
            f"{root} is not the farm's folder any more ({error.strerror}): is another disk mounted there, or none?"
        ) from None
    _check_owner(root)
    for kind in KINDS:
        path = os.path.join(root, kind)
        try:
            found = os.lstat(path)
        except OSError as error:
            raise NotOursError(
                f"{path} is not the farm's folder any more ({error.strerror}): see what removed it"
            ) from None
        if not stat.S_ISDIR(found.st_mode):
            raise NotOursError(f"{path} is a link or a file, and the farm follows none: remove it")
        _check_owner(path)


def is_own(root: str, kind: str, name: str) -> bool:
    """Tells whether the farm made ROOT/KIND/NAME: a real folder of this user, on the same disk, named as it names."""
    if re.fullmatch(FORMS[kind], name) is None:
        return False
    try:
        outer, found = os.lstat(os.path.join(root, kind)), os.lstat(os.path.join(root, kind, name))
    except OSError:
        return False
    return (
        stat.S_ISDIR(outer.st_mode)
        and stat.S_ISDIR(found.st_mode)
        and found.st_uid == os.geteuid()
        and found.st_dev == outer.st_dev
    )


def sync(path: str) -> None:
    """Waits until a file or folder would survive a power cut. Raises OSError where the disk reports a fault."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # a file system that has no such thing
            raise
    finally:
        os.close(handle)


def _mark(path: str) -> None:
    aside = os.path.join(path, f"{MARKER}.{os.getpid()}.part")
    if os.path.lexists(aside):  # of a process that had this number
        os.unlink(aside)
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        os.write(handle, b"This folder belongs to edgemoe-farm, which may remove what is in it.\n")
        os.fsync(handle)
    finally:
        os.close(handle)
    os.rename(aside, os.path.join(path, MARKER))


def _make(path: str) -> None:
    """Makes a folder that is this user's alone, with those above it. Others may make it at the same moment."""
    above = os.path.dirname(path)
    if not os.path.isdir(above):
        _make(above)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass  # whose it is will be seen
    else:
        with contextlib.suppress(PermissionError):  # a folder that may be written and not be read
            sync(above)


def _check_owner(path: str) -> None:
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise NotOursError(f"{path} is not a folder: set another `root`")
    if found.st_uid != os.geteuid():
        raise NotOursError(f"{path} belongs to another user (number {found.st_uid}): set another `root`")
    if _others_write(found):
        raise NotOursError(
            f"others may write to {path}: run `chmod go-w {path}` there if nobody did, or set another `root`"
        )


def _others_write(found: os.stat_result) -> bool:
    """Tells whether a folder may be written by others; a group that is this user's own, as on Debian, is no others."""
    if found.st_mode & stat.S_IWOTH:
        return True
    return bool(found.st_mode & stat.S_IWGRP) and found.st_gid != 0 and not _is_private(found.st_gid)


def _is_private(group: int) -> bool:
    """Tells whether a group is named as this user, and has no other members."""
    try:
        import grp
        import pwd

        user, found = pwd.getpwuid(os.geteuid()).pw_name, grp.getgrgid(group)
    except (ImportError, KeyError):
        return group == os.geteuid()
    return found.gr_name == user and set(found.gr_mem) <= {user}


def _resolved(root: str) -> str:
    """Returns the absolute path of `root` without links, each part of which only this user or root can replace."""
    todo: List[str] = os.path.join(os.getcwd(), root).split("/")[::-1]
    path, links = "/", 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            path = os.path.dirname(path)
            continue
        inner = os.path.join(path, part)
        try:
            found: Optional[os.stat_result] = os.lstat(inner)
        except FileNotFoundError:
            found = None
        _check_above(path, found, inner)
        if found is not None and stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _MOST_LINKS:
                raise NotOursError(f"{root} has too many links: set another `root`")
            target = os.readlink(inner)
            path = "/" if target.startswith("/") else path
            todo += target.split("/")[::-1]
            continue
        path = inner
    if path == "/":
        raise NotOursError(f"{root} is the whole file system: set another `root`")
    return path


def _check_above(folder: str, inner: Optional[os.stat_result], name: str) -> None:
    """Raises NotOursError where others could put something else under the name of `inner`."""
    try:
        found = os.lstat(folder)
    except FileNotFoundError:
        return  # it will be made
    trusted = {0, os.geteuid()} | _of_the_system()
    # Where root logs in, a user's folder may hold the farm's, as a checkout does in a container. Its owner could put
    # only another of root's folders there, as what is not root's own is refused.
    if found.st_uid not in trusted and os.geteuid() != 0:
        raise NotOursError(
            f"{folder} belongs to another user (number {found.st_uid}), who may replace {name}: set another `root`"
        )
    if not _others_write(found):
        return
    if found.st_mode & stat.S_ISVTX and (inner is None or inner.st_uid in trusted):
        return  # as in /tmp: others can neither rename nor remove what is not theirs
    if found.st_mode & stat.S_ISVTX and inner is not None:
        raise NotOursError(f"{name} belongs to another user (number {inner.st_uid}): set another `root`")
    raise NotOursError(
        f"others may write to {folder}, and so replace {name}: run `chmod go-w {folder}` there, or set another `root`"
    )


def _of_the_system() -> set:  # type: ignore[type-arg,unused-ignore]
    """Returns the users beside root who own a system's folders: Android's, and root's stand-in in a container."""
    if hasattr(sys, "getandroidapilevel") or "ANDROID_ROOT" in os.environ:
        return {1000}
    try:
        with open("/proc/self/uid_map") as file:
            whole = file.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return set()
    return set() if whole else {65534}
