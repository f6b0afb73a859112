"""How Sphinx builds these pages: `make docs` writes them to build/docs."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "_ext"))

import extraopt

project = "extraopt"
author = copyright = "extraopt contributors"
version = release = extraopt.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "repository", "jumps"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_ext"]

default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_default_options = {"show-inheritance": True}
napoleon_custom_sections = ["Shapes", "Loading", "Source"]
napoleon_use_rtype = False

html_title = "extraopt"  # a longer one leaves no room for the buttons on a phone
html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["extraopt.css"]
html_math_renderer = "mathml"
html_show_sourcelink = False
html_theme_options = {
    "show_prev_next": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": [], "getting-started": []}
