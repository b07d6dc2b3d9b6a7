"""The site that `make docs` builds from these pages and the docstrings, with Sphinx."""

import dpdist

project = "dpdist"
author = "the dpdist developers"
version = release = dpdist.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_site"]
root_doc = "index"
# In docstrings a single backtick marks code.
default_role = "code"

# Pages are read on their own as well, as Markdown: links are those of files, and headings can be linked to.
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_preserve_defaults = True
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"dpdist {release}"
html_show_sourcelink = False
html_static_path: list[str] = []
# Nothing is loaded from elsewhere: the site works offline.
html_theme_options = {"source_view_link": "", "top_of_page_buttons": []}
