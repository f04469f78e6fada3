"""Lets a page include a file of the repository, links across them, and brings what a reader loads.

A line `<!-- include: benchmarks/RESULTS.md -->` is replaced by that file, without its title, so
that each text has one source. Links of every page that lead out of docs/ are turned to the page
that includes their target, or to a copy of it. Formulas are set by a MathJax that is copied from
an installed package: its output is SVG, so that it needs neither fonts nor a network.
"""

import importlib.util
import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parent.parent
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
MATHJAX = "javascripts/mathjax/tex-svg.js"


def on_files(files, config):
    """Add MathJax to the site."""
    package = importlib.util.find_spec("mathjax")
    source = package and Path(
        package.submodule_search_locations[0], "static/mathjax/es5/tex-svg.js"
    )
    if not source or not source.exists():
        raise PluginError("django-static-mathjax is missing. Run: pip install '.[docs]'")
    files.append(File.generated(config, MATHJAX, abs_src_path=str(source)))
    return files


def on_post_page(output, page, config):
    """Load MathJax where there are formulas."""
    if 'class="arithmatex"' not in output:
        return output
    sources = (get_relative_url(s, page.url) for s in ("javascripts/mathjax.js", MATHJAX))
    return output.replace(
        "</body>", "".join(f'<script src="{s}"></script>' for s in sources) + "</body>"
    )


def on_page_markdown(markdown, page, config, files):
    """Replace the includes of a page, and lead its links to pages of the site."""
    pages = {path: f.src_uri for f in files.documentation_pages() for path in _included(f)}

    def relink(text, folder):
        def lead(match):
            target = posixpath.normpath(posixpath.join(folder, match[1]))
            uri = pages.get(target, target.removeprefix("docs/"))
            if uri == target:
                if target.endswith(".md") or not (ROOT / target).exists():
                    return match[0]  # which mkdocs then reports, unless it is a page
                if not files.get_file_from_path(uri):
                    source = str(ROOT / target)
                    files.append(File.generated(config, uri, abs_src_path=source))
            here = posixpath.dirname(page.file.src_uri) or "."
            return f"]({posixpath.relpath(uri, here)}{match[2] or ''})"

        return LINK.sub(lead, text)

    def include(match):
        text = (ROOT / match[1]).read_text().split("\n", 1)[1]
        return relink(text, posixpath.dirname(match[1]))

    own = relink(markdown, posixpath.join("docs", posixpath.dirname(page.file.src_uri)))
    return INCLUDE.sub(include, own)


def _included(file):
    return INCLUDE.findall(Path(file.abs_src_path).read_text()) if file.abs_src_path else []
