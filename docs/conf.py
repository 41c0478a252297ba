"""The site: Sphinx, furo and MyST.

Sphinx rather than mkdocs-material: the latter is in maintenance and its successor before 1.0,
while Sphinx 9, furo and MyST are released and fail a build on any broken reference.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "tools"))

from api_page import write_pages  # noqa: E402 (found on the path above)

project = "edgemoe"
author = "the edgemoe authors"
version = release = re.search(
    r'__version__ = "([^"]+)"', (HERE.parent / "edgemoe" / "versions.py").read_text("utf-8")
)[1]  # type: ignore[index]
copyright = author  # noqa: A001 (Sphinx's name)

extensions = ["myst_parser"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["_build", "pictures", "tools", "extending/examples"]
root_doc = "index"
default_role = "code"  # docstrings have single backticks
add_module_names = False
smartquotes = False  # options begin with two hyphens
python_maximum_signature_line_length = 88
myst_heading_anchors = 4

html_theme = "furo"
html_title = f"edgemoe {release}"
html_show_sourcelink = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["edgemoe.css"]
pygments_style = "friendly"
highlight_language = "none"

write_pages(HERE.parent, HERE / "_generated" / "api")
