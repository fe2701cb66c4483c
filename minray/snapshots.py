"""Snapshots of local directories, modules and archives: copies that never change, named after what they contain.

Owns `<session>/runtime_env/`, in which each name says what is there and ends in a hash of its contents::

    dir-<hash>/             a working directory, or a project that pip is to install
    module-<hash>/<name>    a package or a module; <its directory> goes on sys.path
    zip-<hash>/             what an archive contained
    file-<hash>/<name>      a file that pip is to install

The same contents have the same name, so a snapshot is taken once, whoever asks for it; processes that take it at once
each make their own copy, and one of the renames wins.  A path in the store is a snapshot already, and stays as it is.

Nothing is left out in silence but what `ALWAYS_EXCLUDED`, `excludes` and .gitignore files name, and what is no file or
directory (sockets, pipes).  Symbolic links are followed.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

MAX_BYTES = 500 << 20
"""More than this is hardly meant to be copied (Ray's limit, too)."""
ALWAYS_EXCLUDED = (".git/", "__pycache__/", ".venv/", "venv/")
IGNORE_FILES = (".gitignore", ".rayignore")
IGNORE_SWITCH = "RAY_RUNTIME_ENV_IGNORE_GITIGNORE"
"""Set to 1 in the environment: files named .gitignore are not looked at.  Ray's name."""


class Entry(NamedTuple):
    name: str  # relative to the directory, with "/"; a directory's ends in one
    path: str
    size_bytes: int


# ---------------------------------------------------------------- what is asked for


def of_directory(path: str, store: str, excludes: Sequence[str]) -> str:
    """The snapshot of a directory or of a .zip file.  Raises ValueError if it cannot be taken."""
    if is_in(path, store):
        return path
    if is_archive(path):
        root = _unpacked(path, store)
        inside = os.listdir(root)
        only = os.path.join(root, inside[0]) if len(inside) == 1 else ""
        return only if os.path.isdir(only) else root  # An archive of a directory is that directory.
    entries = list(_walk(path, excludes))
    return _kept(store, f"dir-{_digest(entries)}", lambda target: _copy(entries, target))


def of_module(path: str, store: str, excludes: Sequence[str]) -> str:
    """The snapshot of a package or module; its directory belongs on sys.path.  Of an archive, its first entry."""
    if is_in(path, store):
        return path
    if is_archive(path):
        root = _unpacked(path, store)
        return os.path.join(root, min(os.listdir(root), default=""))
    name = os.path.basename(path)
    if os.path.isfile(path):
        entries = [Entry(name, path, os.path.getsize(path))]
    else:
        entries = [Entry(f"{name}/{entry.name}", entry.path, entry.size_bytes) for entry in _walk(path, excludes)]
        entries.insert(0, Entry(f"{name}/", path, 0))
    return os.path.join(_kept(store, f"module-{_digest(entries)}", lambda target: _copy(entries, target)), name)


def of_requirement(line: str, store: str) -> str:
    """A requirement that is a local path, as a snapshot: it is built there and not in the user's tree, and its name
    tells its contents.  Any other requirement, and one to be installed editable, as it is."""
    if not os.path.isabs(line) or not os.path.exists(line) or is_in(line, store):
        return line
    if os.path.isdir(line):
        return of_directory(line, store, ["build/", "*.egg-info/"])
    entry = Entry(os.path.basename(line), line, os.path.getsize(line))
    return os.path.join(_kept(store, f"file-{_digest([entry])}", lambda target: _copy([entry], target)), entry.name)


def is_archive(path: str) -> bool:
    return path.endswith((".zip", ".whl")) and os.path.isfile(path)


def is_in(path: str, store: str) -> bool:
    return path.startswith(store + os.sep)


# ---------------------------------------------------------------- how it is done


def _kept(store: str, name: str, make: Callable[[str], None]) -> str:
    """The path of that snapshot; made now, in the directory that `make` is given, if it is not there."""
    target = os.path.join(store, name)
    if os.path.isdir(target):
        return target
    import shutil  # Here, as below: it takes longer to load than all the rest.

    os.makedirs(store, mode=0o700, exist_ok=True)
    partial = f"{target}.{os.getpid()}.{threading.get_ident()}"
    os.mkdir(partial, 0o700)
    try:
        make(partial)
        with suppress(OSError):  # Another process was quicker, and has the same.
            os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _digest(entries: Sequence[Entry]) -> str:
    digest = hashlib.blake2b(digest_size=10)
    for entry in entries:
        digest.update(f"{entry.name}\0{entry.size_bytes}\0".encode("utf-8", "surrogateescape"))
        if not entry.name.endswith("/"):
            digest.update(b"x" if os.access(entry.path, os.X_OK) else b"-")
            with open(entry.path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def _copy(entries: Sequence[Entry], target: str) -> None:
    import shutil

    for entry in entries:
        path = os.path.join(target, entry.name)
        if entry.name.endswith("/"):
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            shutil.copyfile(entry.path, path)
            shutil.copystat(entry.path, path)


def _unpacked(path: str, store: str) -> str:
    import zipfile

    entry = Entry(os.path.basename(path), path, os.path.getsize(path))

    def unpack(target: str) -> None:
        with zipfile.ZipFile(path) as archive:
            size = sum(info.file_size for info in archive.infolist())
            if size > MAX_BYTES:
                raise ValueError(_too_large(path, size, Counter({i.filename: i.file_size for i in archive.infolist()})))
            archive.extractall(target)

    try:
        return _kept(store, f"zip-{_digest([entry._replace(name='')])}", unpack)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"runtime_env: {path} cannot be unpacked: {error}.") from None


def _walk(path: str, excludes: Sequence[str]) -> Iterator[Entry]:
    """Everything below, in a fixed order, but for what is excluded."""
    total = 0
    largest: Counter[str] = Counter()
    rules = [Rule.of(pattern, "") for pattern in (*ALWAYS_EXCLUDED, *excludes)]
    waiting = [("", frozenset((os.path.realpath(path),)), rules)]
    while waiting:
        prefix, ancestors, rules = waiting.pop()
        directory = os.path.join(path, prefix)
        try:
            found = sorted(os.scandir(directory), key=lambda item: item.name)
        except OSError as error:
            raise ValueError(
                f"runtime_env: {directory} cannot be read: {error.strerror}. Name it in excludes, if it is not needed."
            ) from None
        lists = [item.path for item in found if item.name in IGNORE_FILES]
        rules = rules + [rule for ignore_file in lists for rule in _ignore_file(ignore_file, prefix)]
        for item in found:
            name = prefix + item.name
            is_directory = item.is_dir()
            if is_excluded(name, is_directory, rules):
                continue
            if is_directory:
                real = os.path.realpath(item.path)
                if real not in ancestors:  # A link to a directory that it lies in would never end.
                    waiting.append((f"{name}/", ancestors | {real}, rules))
                    yield Entry(f"{name}/", item.path, 0)
            elif item.is_file():
                size = item.stat().st_size
                total += size
                largest[name.partition("/")[0]] += size
                if total > MAX_BYTES:
                    raise ValueError(_too_large(path, total, largest))
                yield Entry(name, item.path, size)


def _too_large(path: str, total: int, largest: Counter[str]) -> str:
    parts = ", ".join(f"{name} {size >> 20:,} MiB" for name, size in largest.most_common(3))
    first = largest.most_common(1)[0][0]
    return (
        f"runtime_env: {path} holds {total >> 20:,} MiB or more ({parts}), and at most {MAX_BYTES >> 20} MiB are "
        f'copied for workers. Leave out what tasks do not need: runtime_env={{..., "excludes": ["{first}"]}}'
    )


def _ignore_file(path: str, prefix: str) -> list[Rule | None]:
    if os.environ.get(IGNORE_SWITCH) == "1" and path.endswith(".gitignore"):
        return []
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return [Rule.of(line.rstrip("\n"), prefix) for line in file]
    except OSError:
        return []


# ---------------------------------------------------------------- patterns as in .gitignore


class Rule(NamedTuple):
    expression: re.Pattern[str]
    negated: bool
    only_directories: bool

    @classmethod
    def of(cls, line: str, prefix: str) -> Rule | None:
        """One line; None for a comment or an empty one.  `prefix`: of the directory whose file it stands in."""
        pattern = re.sub(r"(?<!\\) +$", "", line)
        if not pattern or pattern.startswith("#"):
            return None
        negated = pattern.startswith("!")
        pattern = pattern[negated:]
        only_directories = pattern.endswith("/")
        pattern = pattern.rstrip("/")
        anchored = "/" in pattern
        pattern = pattern.removeprefix("./").lstrip("/")
        start = re.escape(prefix) + ("" if anchored else "(?:.*/)?")
        return cls(re.compile(start + _translated(pattern), re.DOTALL), negated, only_directories)


def _translated(pattern: str) -> str:
    parts = []
    for token in re.findall(r"(?:^|(?<=/))\*\*/|/\*\*$|\*+|\?|\[!?\]?[^]]*\]|\\.|.", pattern):
        if token == "**/":
            parts.append("(?:.*/)?")
        elif token == "/**":
            parts.append("/.+")
        elif token.startswith("*"):
            parts.append("[^/]*")
        elif token == "?":
            parts.append("[^/]")
        elif token.startswith("[") and len(token) > 2:
            inside = token[1:-1].replace("\\", "\\\\")
            parts.append(f"[{'^' + inside[1:] if inside.startswith('!') else inside}]")
        else:
            parts.append(re.escape(token[-1]))
    return "".join(parts)


def is_excluded(name: str, is_directory: bool, rules: Sequence[Rule | None]) -> bool:
    """The last rule that speaks of it decides."""
    for rule in reversed(rules):
        if rule is not None and (is_directory or not rule.only_directories) and rule.expression.fullmatch(name):
            return not rule.negated
    return False
