"""Makes each picture a link to itself, so that a reader on a phone can open and enlarge it."""

import re

PICTURE = re.compile(r'<p>(<img [^>]*src="([^"]+)"[^>]*>)</p>')


def on_page_content(html, page, config, files):
    """Wrap the pictures that stand alone."""
    return PICTURE.sub(r'<p class="picture"><a href="\2">\1</a></p>', html)
