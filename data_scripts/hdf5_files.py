"""Opening HDF5 files of others, and what every dataset in them must be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class UnreadableFileError(ValueError):
    """The file has not the format that it should have, or it is truncated or damaged."""


def import_h5py():
    """The module h5py.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import h5py
    except ImportError:
        raise ValueError('HDF5 files need h5py; install it with: pip install "hepzoo[data]"') from None
    return h5py


@contextmanager
def opened_hdf5(path: str | os.PathLike) -> Iterator[Any]:
    """The open HDF5 file; errors of the library, while opening or reading, become `UnreadableFileError`."""
    h5py = import_h5py()
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    # h5py reports damage by any of these.
    except (OSError, RuntimeError, KeyError, TypeError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UnreadableFileError(f"{path}: not a readable HDF5 file, truncated or damaged ({reason:.120})") from None


def check_values_are_here(data: Any, name: str, group: Any, path: str | os.PathLike) -> None:
    """
    Raises:
        ValueError: the values of the dataset `data`, `name` in `group`, are in other files, or compressed in a way that
            h5py cannot read.
    """
    h5py = import_h5py()
    # A missing source of a virtual dataset would read as zeros.
    if data.file.filename != group.file.filename or data.is_virtual or data.external:
        raise ValueError(f"{path}: {name} takes its values from other files; expected data in the file itself")
    settings = data.id.get_create_plist()
    for index in range(settings.get_nfilters()):
        code = settings.get_filter(index)[0]
        if not h5py.h5z.filter_avail(code):
            with suppress(ImportError):
                import hdf5plugin  # noqa: F401
            if not h5py.h5z.filter_avail(code):
                raise ValueError(
                    f"{path}: {data.name} is compressed by HDF5 filter {code}; reading it needs: pip install hdf5plugin"
                )
