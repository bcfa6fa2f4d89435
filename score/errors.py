"""What can go wrong when files are scored; bundle.errors has the tree that these belong to."""

from bundle.errors import BadInput, EdgewardError


class Missing(BadInput):
    """A value of an example is not there."""


class FolderFailed(EdgewardError):
    """The output cannot be written: the disk is full, or the folder may not be written. What is there stays."""


class TooManyBadRows(EdgewardError):
    """More rows could not be scored than --max-error-rate allows. The parts that were written stay."""


class WorkerDied(EdgewardError):
    """A process was killed, or crashed, twice on the same unit. The parts that were written stay."""
