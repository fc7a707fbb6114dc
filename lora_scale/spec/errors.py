"""What can go wrong in a way the user can act on, and the exit code of each. Messages name the key, the value and the
way out."""

from typing import ClassVar


class LoraScaleError(Exception):
    """Base class: the command line prints it as one line, without a traceback, and exits with `exit_code`."""

    exit_code: ClassVar[int] = 1


class UsageError(LoraScaleError):
    """The command line itself is wrong."""

    exit_code = 2


class ConfigError(LoraScaleError):
    """The run as written cannot work."""

    exit_code = 2


class ModelError(LoraScaleError):
    """The base model's folder is incomplete, damaged, or of a form that is not read."""

    exit_code = 2


class DataError(LoraScaleError):
    """A data file is missing, or a row in it cannot be used."""

    exit_code = 2


class CheckpointError(LoraScaleError):
    """A checkpoint or adapter is missing, damaged, or belongs to another run."""

    exit_code = 2


class DoesNotFitError(LoraScaleError):
    """The job needs more memory or disk than there is."""

    exit_code = 3


class FindingError(LoraScaleError):
    """`doctor` found something that will hurt a run."""

    exit_code = 4


class TrainingError(LoraScaleError):
    """The run started and a guard stopped it."""

    exit_code = 1


class InterruptedRunError(LoraScaleError):
    """The run was asked to stop; it saved, and the same command resumes it."""

    exit_code = 75
