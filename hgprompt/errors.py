"""Errors of hgprompt: what was wrong, where, and what to do.

Every exception that hgprompt raises about its input derives from HGPromptError, so that an embedding program
can tell them from its own; most also derive from the built-in exception a reader would expect.
"""

from __future__ import annotations

import sys
import warnings

_NOT_THE_CALLER = ("hgprompt", "torch", "contextlib")


class HGPromptError(Exception):
    """Base class of all errors that hgprompt raises on purpose."""


class PromptError(HGPromptError, ValueError):
    """Prompts that cannot be used: shapes, widths, values, or what they make of the features."""


class BackboneError(HGPromptError, ValueError):
    """A backbone that cannot be packed, or an input that it refuses."""


class DataError(HGPromptError, ValueError):
    """Images or labels, in a loader or on disk, that cannot be used."""


class StatisticsError(HGPromptError, ValueError):
    """Statistics that are empty, inconsistent, or cannot answer what was asked of them."""


class FileFormatError(HGPromptError, ValueError):
    """A file that is not what it should be: truncated, of another format, or beyond the size limits."""


class OutputError(HGPromptError, OSError):
    """A place that cannot be written to."""


class DeviceMemoryError(HGPromptError, RuntimeError):
    """A device without room for one image under one prompt."""


class OptionError(HGPromptError, ValueError):
    """An argument outside the values that it can take."""


class DistributedError(HGPromptError, RuntimeError):
    """Ranks of a process group that do not work together: called differently, or one has failed, died or hung."""


class HGPromptWarning(UserWarning):
    """Something that the caller should know about, although the call goes on."""


def warn(message: str) -> None:
    """An HGPromptWarning that names the line of the caller's program: by which Python shows it once per place."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _NOT_THE_CALLER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, HGPromptWarning, stacklevel=level)
