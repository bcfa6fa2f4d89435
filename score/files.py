"""Files, folders, globs and URLs -> the files that they name, in an order that never changes."""

import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, BinaryIO, NamedTuple, cast

from pyarrow import fs

from bundle.errors import DataError, MissingExtra
from bundle.log import log
from score.units import InputFile, Kind

KINDS: dict[str, Kind] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".npz": "npz",
    ".png": "images",
    ".jpg": "images",
    ".jpeg": "images",
}
LIST = ".txt"  # of images, a path a line
_BUFFER = 1 << 20
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://")
_STORES = {"s3://": "", "gs://": "?retry_limit_seconds=60"}  # pyarrow tries gs:// for 15 minutes


class Found(NamedTuple):
    """A file to score; of images, with the path of each."""

    file: InputFile
    entries: tuple[str, ...] = ()


class _Place(NamedTuple):
    """A filesystem, what a path is called there, and what stands before that in a URL."""

    system: Any
    path: str
    prefix: str


def absolute(path: str) -> str:
    """A local path from the root; a URL as it is."""
    return os.path.abspath(path) if is_local(path) else path


def is_local(path: str) -> bool:
    """Whether it is a path of this machine, not a URL."""
    return not _SCHEME.match(path)


def _place(path: str) -> _Place:
    found = _SCHEME.match(path)
    if not found:
        return _Place(fs.LocalFileSystem(), path, "")
    if found[0] in _STORES:
        bucket = path[found.end() :].split("/")[0]
        user, at, _ = bucket.rpartition("@")  # gs://anonymous@BUCKET: without credentials, as pyarrow writes it
        prefix = found[0] + user + at
        return _Place(_bucket(found[0] + bucket, _STORES[found[0]]), path.removeprefix(prefix), prefix)
    return _fsspec(path)


@cache
def _bucket(url: str, options: str) -> Any:
    try:
        return fs.FileSystem.from_uri(url + options)[0]
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{url} cannot be reached: {error}.") from error


def _fsspec(path: str) -> _Place:
    try:
        from fsspec.core import url_to_fs

        system, inside = url_to_fs(path)
    except ImportError as error:
        raise MissingExtra(f"{path} cannot be read: {error}.") from error
    except ValueError as error:  # a protocol that it does not know
        raise DataError(f"{path} cannot be read: {error}.") from error
    return _Place(fs.PyFileSystem(fs.FSSpecHandler(system)), inside, path.removesuffix(inside))


def system_of(path: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a path or URL, and what it is called there.

    Raises:
        DataError: the place cannot be reached.
        MissingExtra: what knows the protocol is not installed.
    """
    place = _place(path)
    return place.system, place.path


def open_file(path: str) -> BinaryIO:
    """A file or URL to read and seek in.

    Raises:
        OSError: it cannot be opened.
    """
    if is_local(path):
        return open(path, "rb", buffering=_BUFFER)
    system, inside = system_of(path)
    return cast(BinaryIO, io.BufferedReader(system.open_input_file(inside), _BUFFER))


def version_of(path: str) -> tuple[int, str]:
    """Size and time of change of a file, as InputFile has them; -1 and "" when it is not there."""
    system, inside = system_of(path)
    return _version(path, system.get_file_info(inside))


def _version(path: str, info: Any) -> tuple[int, str]:
    if info.type != fs.FileType.File:
        return -1, ""
    time_ns = info.mtime_ns
    if time_ns and not is_local(path):  # some object stores list fractions of a second that the object does not have
        time_ns -= time_ns % 1_000_000_000
    return info.size, str(time_ns)


def find_inputs(arguments: Sequence[str], *, images: bool, out: str | None = None) -> list[Found]:
    """What the arguments name, each file once, sorted by path.

    Args:
        arguments: files, folders, globs and URLs; of lists every line counts.
        images: whether images and lists of them are wanted; otherwise they are passed over in folders.
        out: a folder, absolute, whose files are no input, so that it may lie in one that is.

    Raises:
        DataError: nothing is there, or something that cannot be scored.
        MissingExtra: what knows the protocol of a URL is not installed.
    """
    tables: dict[str, InputFile] = {}
    pictures: dict[str, Any] = {}
    lists: dict[str, Found] = {}
    for argument in map(absolute, arguments):
        for path, info in _expand(argument, images):
            if out is not None and path.startswith(f"{out.rstrip('/')}/"):
                continue
            kind = KINDS.get(_suffix(path))
            if kind == "images" and images:
                pictures[path] = info
            elif kind and kind != "images":
                tables[path] = _input(path, kind, info)
            elif images and _suffix(path) == LIST:
                lists[path] = _read_list(path, info)
            else:
                raise DataError(f"{path} cannot be scored by this bundle: {_wanted(images)}.")
    found = [*(Found(file) for file in tables.values()), *lists.values(), *_gathered(pictures)]
    if not found:
        raise DataError(f"{', '.join(arguments) or 'the input'} holds nothing to score: {_wanted(images)}.")
    return sorted(found, key=lambda each: each.file.path)


def _wanted(images: bool) -> str:
    suffixes = [suffix for suffix, kind in KINDS.items() if images or kind != "images"]
    return f"expected files that end in {', '.join(suffixes)}" + (f", or {LIST} with a path a line" if images else "")


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _input(path: str, kind: Kind, info: Any) -> InputFile:
    size, version = _version(path, info)
    return InputFile(path=path, kind=kind, size=size, version=version)


def _expand(argument: str, images: bool) -> Iterable[tuple[str, Any]]:
    """Paths and what the filesystem says of them; of a folder, those that are meant."""
    place = _place(argument)
    try:
        info = place.system.get_file_info(place.path)
        if info.type == fs.FileType.File:
            return [(argument, info)]
        if info.type == fs.FileType.Directory:
            return _folder(place, argument, images)
        found = [(place.prefix + each.path, each) for each in _matching(place)]
    except UnicodeDecodeError as error:
        raise DataError(f"{argument} holds {error.object!r}, a name that is not UTF-8. Rename that file.") from error
    except OSError as error:
        raise DataError(f"{argument} cannot be read: {error}.") from error
    if not found:
        raise DataError(f"{argument} is not there.")
    return found


def _folder(place: _Place, argument: str, images: bool) -> list[tuple[str, Any]]:
    """Those of its files that can be scored, at any depth, but for names that begin with a dot or underscore."""
    files = [each for each in _files(place.system, place.path, recursive=True) if not _is_hidden(each, place.path)]
    kinds = {_suffix(each.path): KINDS.get(_suffix(each.path)) for each in files}
    wanted = {suffix for suffix, kind in kinds.items() if kind and (images or kind != "images")}
    if len({kinds[suffix] == "images" for suffix in wanted}) > 1:
        raise DataError(f"folder {argument} holds images and tables. Name those to score, as in '{argument}/*.jpg'.")
    chosen = [each for each in files if _suffix(each.path) in wanted]
    if len(chosen) < len(files):
        log.warning("files passed over", folder=argument, files=len(files) - len(chosen), because=_wanted(images))
    return [(place.prefix + each.path, each) for each in chosen]


def _files(system: Any, path: str, *, recursive: bool) -> list[Any]:
    selector = fs.FileSelector(path, recursive=recursive, allow_not_found=True)
    return [each for each in system.get_file_info(selector) if each.type == fs.FileType.File]


def _is_hidden(info: Any, folder: str) -> bool:
    return any(part[:1] in "._" for part in info.path[len(folder) :].split("/") if part)


def _matching(place: _Place) -> list[Any]:
    """Files that a glob names: * and ? and [] within a name, ** over any number of folders."""
    parts = place.path.split("/")
    magic = [number for number, part in enumerate(parts) if re.search(r"[*?\[]", part)]
    if not magic:
        return []
    base = "/".join(parts[: magic[0]]) or "/"
    recursive = magic[0] < len(parts) - 1 or parts[-1] == "**"
    return [each for each in _files(place.system, base, recursive=recursive) if _matches(each.path.split("/"), parts)]


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern or not path:
        return not pattern and not path
    if pattern[0] == "**":
        return _matches(path, pattern[1:]) or (path[0][:1] != "." and _matches(path[1:], pattern))
    hidden = path[0].startswith(".") and not pattern[0].startswith(".")
    return not hidden and fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _read_list(path: str, info: Any) -> Found:
    try:
        with open_file(path) as file:
            data = file.read()
        lines = data.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a list of images: {error}.") from error
    entries = tuple(beside(path, line.strip()) for line in lines if line.strip())
    digest = hashlib.sha256(data).hexdigest()
    return Found(InputFile(path=path, kind="images", size=info.size, version=digest), entries)


def beside(path: str, name: str) -> str:
    """What a path in a file means: it is relative to the folder that the file is in."""
    return name if not is_local(name) or name.startswith("/") else f"{path.rpartition('/')[0]}/{name}"


def _gathered(pictures: dict[str, Any]) -> list[Found]:
    """All images that were not in a list as one file, which is called after the folder that they have in common."""
    if not pictures:
        return []
    paths = sorted(pictures)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path}\0{pictures[path].size}\0{pictures[path].mtime_ns}\n".encode("utf-8", "surrogateescape"))
    folders = [path.rpartition("/")[0] + "/" for path in paths]
    folder = os.path.commonprefix(folders).rpartition("/")[0] or "/"  # noqa: RUF071, as commonpath breaks URLs
    size = sum(pictures[path].size for path in paths)
    return [Found(InputFile(path=folder, kind="images", size=size, version=digest.hexdigest()), tuple(paths))]
