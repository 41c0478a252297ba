"""Turn what a command raises into one message on stderr and an exit status."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from typing import TYPE_CHECKING, Any, NoReturn

import click

from edgemoe.cli.options import debugging
from edgemoe.disk import describe_full
from edgemoe.errors import EdgemoeError
from edgemoe.interruption import interruptible
from edgemoe.progress import in_lines
from edgemoe_runtime.errors import EdgemoeRuntimeError
from edgemoe_runtime.messages import printable

if TYPE_CHECKING:
    from collections.abc import Iterator


class FailureReportingGroup(click.Group):
    """A group whose commands exit 0 done, 1 refused or failed, 2 wrongly called.

    Without `--debug` a failure is one message; with it, the traceback.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order they were added."""
        del ctx
        return list(self.commands)

    def make_context(self, *given: Any, **settings: Any) -> click.Context:
        """Parse the options of the group; what is refused is made fit to print."""
        try:
            return super().make_context(*given, **settings)
        except click.ClickException as error:
            vars(error)["message"] = printable(error.message)
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and report its failure."""
        _silence_libraries()
        try:
            with interruptible(), _remarks_on_stderr(), in_lines():
                return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except click.ClickException as error:
            vars(error)["message"] = printable(error.message)
            raise
        except BrokenPipeError:
            # The reader of our output has left (`edgemoe ... | head`): no failure of ours.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctx.exit(0)
        except (KeyboardInterrupt, click.Abort) as error:
            _fail(ctx, str(error) or "interrupted. Nothing was left half-written.", error)
        except (EdgemoeError, EdgemoeRuntimeError) as error:
            _fail(ctx, str(error), error)
        except OSError as error:
            _fail(ctx, _describe_os_error(error), error)
        except MemoryError as error:
            _fail(ctx, "out of memory. Free some, or choose a smaller model.", error)
        except Exception as error:
            full = describe_full(error)
            if full is not None:
                _fail(ctx, f"a file could not be written: {full}. Free space.", error)
            # A defect of ours: still one line, and how to see the rest of it.
            summary = next(iter(str(error).splitlines()), "")
            _fail(
                ctx,
                f"unexpected {type(error).__name__}: {summary} (see where with --debug)",
                error,
            )


def _fail(ctx: click.Context, message: str, error: BaseException) -> NoReturn:
    if debugging(ctx):
        raise error
    raise click.ClickException(printable(message)) from error


def _describe_os_error(error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}." if error.filename else f"{reason}."


class _Remarks(logging.Handler):
    """Print what the API remarks as it stands; warnings say that they are some."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "Warning: " if record.levelno >= logging.WARNING else ""
        click.echo(f"{prefix}{printable(record.getMessage())}", err=True)


@contextlib.contextmanager
def _remarks_on_stderr() -> Iterator[None]:
    handler = _Remarks()
    loggers = [logging.getLogger(name) for name in ("edgemoe.api", "edgemoe.models")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.removeHandler(handler)


def _silence_libraries() -> None:
    """Keep other packages' warnings and bars out of a command's output."""
    warnings.simplefilter("ignore")
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        # A checkpoint is a directory here: nothing may go looking for one on a hub.
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
