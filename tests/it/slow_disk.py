"""slow_disk.py SOURCE MOUNTPOINT: a folder seen through a disk as slow as a network's, and as forgetful.

A stand-in for NFS as EFS speaks it: every call that the kernel's short cache does not answer takes a
round trip, what is written takes a longer one, and changes made by another mount of the same source are
seen late and cause no file events. No extended attributes, no O_TMPFILE. Ends with SIGTERM; stopped
(SIGSTOP) it is a disk that does not answer.
"""

import argparse
import os
import time

import mfusepy as fuse

parser = argparse.ArgumentParser()
parser.add_argument("source")
parser.add_argument("mountpoint")
parser.add_argument("--meta-ms", type=float, default=1.5, help="lookup, attributes, listing, open")
parser.add_argument("--write-ms", type=float, default=3.0, help="create, remove, rename, link, sync")
parser.add_argument("--io-ms", type=float, default=0.6, help="each piece that is read or written")
parser.add_argument("--mbps", type=float, default=100.0, help="megabytes a second")
parser.add_argument("--attr-s", type=float, default=3.0, help="how long attributes and names are believed")
options = parser.parse_args()
SOURCE = os.path.realpath(options.source)
STAT = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_ino", "st_blocks")
STATFS = ("f_bavail", "f_bfree", "f_blocks", "f_bsize", "f_favail", "f_ffree", "f_files", "f_flag", "f_frsize", "f_namemax")


def take(ms, size=0):
    time.sleep(ms / 1e3 + size / (options.mbps * 1e6))


def at(path):
    return SOURCE + path


class SlowDisk(fuse.Operations):
    use_ns = True

    def __init__(self):
        self.dirty = set()

    def getattr(self, path, fh=None):
        if fh is None:
            take(options.meta_ms)
        found = os.lstat(at(path)) if fh is None else os.fstat(fh)
        told = {key: getattr(found, key) for key in STAT}
        told.update(st_atime=found.st_atime_ns, st_mtime=found.st_mtime_ns, st_ctime=found.st_ctime_ns)
        return told

    def readdir(self, path, fh):
        take(options.meta_ms)
        return [".", ".."] + os.listdir(at(path))

    def readlink(self, path):
        take(options.meta_ms)
        return os.readlink(at(path))

    def access(self, path, mode):
        return 0

    def statfs(self, path):
        found = os.statvfs(at(path))
        return {key: getattr(found, key) for key in STATFS}

    def mkdir(self, path, mode):
        take(options.write_ms)
        os.mkdir(at(path), mode)
        return 0

    def rmdir(self, path):
        take(options.write_ms)
        os.rmdir(at(path))
        return 0

    def unlink(self, path):
        take(options.write_ms)
        os.unlink(at(path))
        return 0

    def rename(self, old, new, flags=0):
        take(options.write_ms)
        os.rename(at(old), at(new))
        return 0

    def symlink(self, target, source):
        take(options.write_ms)
        os.symlink(source, at(target))
        return 0

    def link(self, target, source):
        take(options.write_ms)
        os.link(at(source), at(target))
        return 0

    def chmod(self, path, mode, fh=None):
        take(options.write_ms)
        os.chmod(at(path), mode)
        return 0

    def chown(self, path, uid, gid, fh=None):
        take(options.write_ms)
        os.lchown(at(path), uid, gid)
        return 0

    def truncate(self, path, length, fh=None):
        take(options.write_ms)
        if fh is None:
            os.truncate(at(path), length)
        else:
            os.ftruncate(fh, length)
        return 0

    def utimens(self, path, times=None, fh=None):
        take(options.write_ms)
        os.utime(at(path), ns=times, follow_symlinks=False)
        return 0

    def open(self, path, flags):
        take(options.meta_ms)
        # The kernel knows where the end is.
        return os.open(at(path), flags & ~os.O_APPEND)

    def create(self, path, mode, fi=None):
        take(options.write_ms)
        return os.open(at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)

    def read(self, path, size, offset, fh):
        piece = os.pread(fh, size, offset)
        take(options.io_ms, len(piece))
        return piece

    def write(self, path, piece, offset, fh):
        self.dirty.add(fh)
        take(options.io_ms, len(piece))
        return os.pwrite(fh, piece, offset)

    def flush(self, path, fh):
        take(options.write_ms if fh in self.dirty else options.meta_ms)
        self.dirty.discard(fh)
        return 0

    def fsync(self, path, datasync, fh):
        self.dirty.discard(fh)
        take(options.write_ms)
        return 0

    def release(self, path, fh):
        os.close(fh)
        return 0


fuse.FUSE(
    SlowDisk(),
    options.mountpoint,
    foreground=True,
    nothreads=False,
    allow_other=True,
    default_permissions=True,
    attr_timeout=options.attr_s,
    entry_timeout=options.attr_s,
    negative_timeout=0,
)
