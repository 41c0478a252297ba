"""The Python API: one function per verb of the command line, one file per function.

The functions are imported from the front door, `from edgemoe import prune`; this package is
where they are written. Each has the defaults and the errors of its command, takes the same
files or the objects that they hold, and reports progress to `on_progress`, a function of
`edgemoe.progress.ProgressEvent`; without it a bar is drawn where stderr is a terminal. A
product that fits into memory is returned, and written too where `output` names a file; one that
does not is written, and its report is returned. Commands parse, call these functions and print.

Importing these modules costs no torch: what works is imported inside the calls.

**Why `edgemoe.prune` is the function.** Seven verbs share their name with the package that
holds their methods. The import system binds a package to its parent's attribute, so that
`from edgemoe import prune` would give the function or the package, whichever came last. Here it
is always the function, as documentation, editors and type checkers say: a plain function, with
its signature, its docstring, and a pickle by name. Packages are found in `sys.modules`, so
`import edgemoe.prune.registry` and `from edgemoe.prune import registry` need no attribute. The
function's `__dict__` is the package's namespace: `edgemoe.prune.registry`,
`import edgemoe.prune.registry as registry` and a test that patches
`"edgemoe.prune.registry.METHODS"` find what they would find in the package, and what they
change, they change there. `edgemoe/__init__.py` does both in a few lines. Packages that can be
called were the other way: `help(prune)` would then describe a package, no type checker would
know the call, and each package would have to know the function above it.
"""
