"""What the exit code of a server says. Importing this loads nothing."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Codes 2 to 6 say that starting again is of no use until someone has changed something."""

    DONE = 0
    FAILED = 1
    """A defect; its traceback is on standard error."""
    SETTING = 2
    MODEL = 3
    """The base model is missing, broken or not supported."""
    PORT = 4
    """The address cannot be listened on."""
    HELD = 5
    """The data folder belongs to another server that is running."""
    DATA = 6
    """The data folder cannot be written: no permission, no space, no folder."""
