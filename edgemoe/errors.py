"""What the kit refuses, and why.

Every message says the rule, the value it got and the remedy. The tree::

    EdgemoeError
    ├── ArgumentError (ValueError)       arguments that do not go together
    ├── CheckpointError (ValueError)     a checkpoint is missing, unsafe or malformed
    │   └── FamilyError                  the model family is not supported
    ├── StreamingError (RuntimeError)    a model cannot be run one decoder layer at a time
    ├── SpreadError (RuntimeError)       jobs could not be run on other processes or machines
    ├── TaskFileError (ValueError)       a task file breaks the format
    ├── StatisticsError (ValueError)     statistics are malformed or do not fit together
    ├── PlanError (ValueError)           a plan cannot be carried out on this checkpoint
    ├── AllocationError (ValueError)     experts per token cannot be allocated as asked
    ├── SweepError (ValueError)          a sweep cannot be run as asked
    ├── CarveError (ValueError)          a dense checkpoint cannot be carved as asked
    ├── RecoveryError (ValueError)       a checkpoint cannot be trained as asked
    ├── ExportError (RuntimeError)       a graph or bundle could not be made
    │   ├── ParityError                  the exported graph disagrees with the eager model
    │   └── QualityGateError             the exported task lost more than --max-drop allows
    ├── CompileError (RuntimeError)      an engine could not be built
    ├── OutputError (OSError)            the output exists, or cannot be written
    └── MissingDependencyError (ImportError)   an extra is not installed
"""

from __future__ import annotations


class EdgemoeError(Exception):
    """Base of everything the kit raises on purpose."""


class ArgumentError(EdgemoeError, ValueError):
    """Arguments do not go together, or one of them is missing; commands exit with 2."""


class CheckpointError(EdgemoeError, ValueError):
    """A checkpoint is missing, unsafe or malformed."""


class FamilyError(CheckpointError):
    """The model family is not supported; the message lists those that are."""


class StreamingError(EdgemoeError, RuntimeError):
    """A model cannot be loaded or run one decoder layer at a time."""


class SpreadError(EdgemoeError, RuntimeError):
    """Jobs could not be run on other processes or machines."""


class TaskFileError(EdgemoeError, ValueError):
    """A task file breaks the format; the message names the line."""


class StatisticsError(EdgemoeError, ValueError):
    """Statistics are malformed, or two of them do not belong together."""


class PlanError(EdgemoeError, ValueError):
    """A plan cannot be carried out on this checkpoint."""


class AllocationError(EdgemoeError, ValueError):
    """Experts per token cannot be allocated as asked."""


class SweepError(EdgemoeError, ValueError):
    """A sweep cannot be run as asked."""


class CarveError(EdgemoeError, ValueError):
    """A dense checkpoint cannot be carved as asked."""


class RecoveryError(EdgemoeError, ValueError):
    """A compressed checkpoint cannot be trained as asked."""


class ExportError(EdgemoeError, RuntimeError):
    """A graph or a bundle could not be made."""


class ParityError(ExportError):
    """The exported graph disagrees with the eager model."""


class QualityGateError(ExportError):
    """The exported task lost more quality than the gate allows."""


class CompileError(EdgemoeError, RuntimeError):
    """A TensorRT engine could not be built."""


class OutputError(EdgemoeError, OSError):
    """The output exists already, or it cannot be written."""


class MissingDependencyError(EdgemoeError, ImportError):
    """A package of an optional extra is not installed."""
