"""Lets a page include a file of the repository, so that each text has one source.

A line `<!-- include: benchmarks/RESULTS.md -->` is replaced by that file, without its title. Links
of every page that lead out of docs/ are turned to the page that includes their target, or to a copy
of it.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


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
