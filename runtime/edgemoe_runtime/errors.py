"""Errors that the runtime raises on purpose.

Every message says the rule, the value it got and the remedy. The tree::

    EdgemoeRuntimeError
    ├── BundleError (ValueError)          the bundle cannot be used
    │   ├── ManifestError                 manifest.json is missing or breaks the format
    │   └── IntegrityError                files disagree with the manifest, or are unsafe
    ├── RequestError (ValueError)         a call asks for something that cannot be done
    ├── BackendError (RuntimeError)       an engine failed
    │   └── BackendUnavailableError       an engine cannot be used here; the next one is tried
    └── SessionClosedError (RuntimeError) the session was used after close()
"""

from __future__ import annotations


class EdgemoeRuntimeError(Exception):
    """Base of everything the runtime raises on purpose."""


class BundleError(EdgemoeRuntimeError, ValueError):
    """The bundle cannot be used."""


class ManifestError(BundleError):
    """The manifest is missing or breaks the format."""


class IntegrityError(BundleError):
    """A file of the bundle disagrees with the manifest, or is unsafe to open."""


class RequestError(EdgemoeRuntimeError, ValueError):
    """A call asks for something that cannot be done."""


class BackendError(EdgemoeRuntimeError, RuntimeError):
    """An inference engine failed."""


class BackendUnavailableError(BackendError):
    """An engine cannot be used on this machine; the message is the reason."""


class SessionClosedError(EdgemoeRuntimeError, RuntimeError):
    """The session was used after it was closed."""
