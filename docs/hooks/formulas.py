"""Copies MathJax from an installed package, so that formulas need no network.

Its output is SVG, which needs no fonts either.
"""

import importlib.util
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

SETTINGS = "javascripts/mathjax.js"
MATHJAX = "javascripts/mathjax/tex-svg.js"


def on_files(files, config):
    """Add MathJax to the site."""
    # django-static-mathjax: the files of MathJax, without Django.
    package = importlib.util.find_spec("mathjax")
    folders = package.submodule_search_locations if package else ()
    sources = [Path(folder, "static/mathjax/es5/tex-svg.js") for folder in folders or ()]
    if not sources or not sources[0].exists():
        raise PluginError("django-static-mathjax is missing. Run: pip install '.[docs]'")
    files.append(File.generated(config, MATHJAX, abs_src_path=str(sources[0])))
    return files


def on_post_page(output, page, config):
    """Load MathJax where there are formulas."""
    if 'class="arithmatex"' not in output:
        return output
    urls = [get_relative_url(path, page.url) for path in (SETTINGS, MATHJAX)]
    scripts = "".join(f'<script src="{url}"></script>' for url in urls)
    return output.replace("</body>", scripts + "</body>")
