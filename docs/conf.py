"""Configuration of the documentation site."""

project = "Muset"
author = copyright = "The Muset maintainers"
extensions = ["myst_parser"]
exclude_patterns = []
html_theme = "furo"
html_title = "Muset"
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]
