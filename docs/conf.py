"""Sphinx's configuration: ``sphinx-build -W docs OUT``, after ``pip install -e '.[docs]'``."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
sys.path.insert(0, str(HERE))  # the modules beside this one
os.environ["MPLBACKEND"] = "Agg"

import gallery  # noqa: E402
import pictures  # noqa: E402
import tables  # noqa: E402

import fastattn  # noqa: E402

project = "fastattn"
author = copyright = "The fastattn developers"
version = release = fastattn.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "numpydoc",
    "matplotlib.sphinxext.plot_directive",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_templates", "_build"]
default_role = "py:obj"  # `scaled_dot` in docstrings links to its page
trim_doctest_flags = True

# --------------------------------------------------------------------------------- the theme

html_theme = "pydata_sphinx_theme"
html_title = f"fastattn {release}"
html_static_path = ["_static"]
html_css_files = ["fastattn.css"]
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_show_sourcelink = False
html_theme_options = {
    "navigation_with_keys": False,
    "show_toc_level": 2,
    "navbar_align": "left",
    "header_links_before_dropdown": 5,
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "secondary_sidebar_items": ["page-toc"],
}
html_sidebars = {"index": []}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# ----------------------------------------------------------------------------- the reference

autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's sections say it in words
# The pages of the integrations are written without the packages that they integrate.
autodoc_mock_imports = gallery.missing({"torch", "jax", "transformers", "dask"})
numpydoc_show_class_members = False
numpydoc_xref_param_type = False
numpydoc_validation_checks = {
    "all",
    "ES01",  # the summary is often all there is to say
    "EX01",  # the example of a method is that of its class
    "PR03",  # options are listed by what they are for
    "PR04",  # options that another page describes are listed by name
    "SA01",  # the guide says which function is for what
}

# ------------------------------------------------------------------------------ the pictures

plot_formats = [("svg", 72)]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_working_directory = str(HERE)

# ------------------------------------------------------------------------------- the gallery

sphinx_gallery_conf = {
    "examples_dirs": str(EXAMPLES),
    "gallery_dirs": "examples",
    "filename_pattern": gallery.runnable(EXAMPLES),
    "ignore_pattern": r"common\.py",
    "reset_argv": "gallery.arguments",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "default_thumb_file": str(HERE / "generated" / "thumbnail.png"),
    "show_signature": False,
    "show_memory": False,
    "write_computation_times": False,
    "plot_gallery": "True",
    "abort_on_example_error": True,
}


def setup(app):
    """What is made of data and by drawing is there before the pages are read."""
    tables.write(HERE / "generated")
    pictures.thumbnail(HERE / "generated" / "thumbnail.png")
