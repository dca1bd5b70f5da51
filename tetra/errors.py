"""Errors that a user can cause and mend.

Every message is one line that names the file or argument, the value found and the way out. The command line
prints it after ``error:`` and exits with status 2, without a traceback.
"""

from __future__ import annotations


class TetraError(Exception):
    """Base of all errors that describe bad input rather than a bug."""


class ConfigError(TetraError, ValueError):
    """A configuration has an unknown key, a wrong type or a value that cannot work."""


class ImageError(TetraError, ValueError):
    """A file is not an image that can be decoded, or an image has a size that the model refuses."""


class DatasetError(TetraError, ValueError):
    """A folder does not hold the data set that was asked for."""


class FileFormatError(TetraError, ValueError):
    """A model file is truncated, altered, of another kind or from a newer release."""


class TrainingError(TetraError, RuntimeError):
    """Training cannot start or go on, for example because a loss is not finite."""


class MapError(TetraError, ValueError):
    """A place map is damaged, of another model or in use, or something given to it cannot be."""


class MissingMapFileError(MapError):
    """A file of a map is not there: it was deleted, or a writer has replaced it since the manifest was read."""
