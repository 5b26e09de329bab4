"""Whether something can be written where a user wants it, found out before any work and without a trace."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tessera.errors import ConfigError


def check_ending(flag: str, path: Path, *suffixes: str) -> None:
    """Raise ConfigError, naming the flag, for a name that ends in none of `suffixes`; the first is what is offered."""
    if path.suffix in suffixes:
        return
    known = f"ends in neither {' nor '.join(suffixes)}" if len(suffixes) > 1 else f"does not end in {suffixes[0]}"
    offered = path.with_suffix(suffixes[0]) if path.name not in ("", ".", "..") else path / f"rows{suffixes[0]}"
    raise ConfigError(f"{flag} {path} {known}", f"use {flag} {offered}")


def check_file(flag: str, path: Path) -> None:
    """Raise ConfigError, naming the flag and the reason, where a file cannot be written; nothing is left behind."""
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder", "name a file in it")
    try:
        if path.exists():
            with path.open("ab"):
                return
    except OSError as error:
        raise _refused(flag, path, error) from None
    _check_room(flag, path, path.parent)


def check_folder(flag: str, path: Path) -> None:
    """Raise ConfigError, naming the flag and the reason, where files cannot be made in a folder, there or not yet."""
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{flag} {path} is a file", "name a folder")
    _check_room(flag, path, path)


def _check_room(flag: str, path: Path, folder: Path) -> None:
    """By a file without a name in the nearest folder that is there: only trying tells, for root may do most things."""
    try:
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise ConfigError(f"{flag} {path} cannot be written: {folder} is a file", "name a place you may write")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _refused(flag, path, error) from None


def _refused(flag: str, path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{flag} {path} cannot be written: {error.strerror or error}", "name a place you may write")
