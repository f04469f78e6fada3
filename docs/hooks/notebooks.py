"""Makes a Jupyter notebook of each page that has a line `<!-- notebook -->`, and links to it there.

The code is the page's, which tests/project/test_docs.py runs.
"""

import json
import re
from pathlib import Path

from mkdocs.structure.files import File

MARK = "<!-- notebook -->"
# A block that is run, or what it prints.
FENCE = re.compile(r"^```(python|output)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMAGE = re.compile(r"!\[[^\]]*\]\([^)]*\)\n*")
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)[^)]*\)")


def on_files(files, config):
    """Add the notebooks to the site."""
    for file in list(files.documentation_pages()):
        text = Path(file.abs_src_path).read_text()
        if MARK in text:
            content = json.dumps(notebook(text), indent=1)
            files.append(File.generated(config, f"{file.name}.ipynb", content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Link to the notebook of a page."""
    link = f"[Download this page as a notebook]({page.file.name}.ipynb){{ download }}"
    return markdown.replace(MARK, link)


def notebook(text):
    """A page as a notebook: its `python` blocks with what they print, and the text around them."""
    cells = []
    for kind, content in _parts(text):
        if kind == "output":
            cells[-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": content}]
            continue
        cell = {"id": f"cell-{len(cells)}", "metadata": {}, "source": content.strip()}
        code = {"cell_type": "code", "execution_count": None, "outputs": []}
        cells.append(cell | (code if kind == "python" else {"cell_type": "markdown"}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": cells}


def _parts(text):
    """Text and blocks in order: `(language of a block or "text", content)`."""
    parts = FENCE.split(text)
    for i, part in enumerate(parts):
        if i % 3 == 2:
            yield parts[i - 1], part
        elif i % 3 == 0:
            # Other pages and pictures do not come with the notebook.
            prose = LINK.sub(r"\1", IMAGE.sub("", part.replace(MARK, "")))
            if prose.strip():
                yield "text", prose
