"""Sphinx configuration of the documentation site (``make docs``)."""

project = "micemu"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "micemu"
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository beside docs/
