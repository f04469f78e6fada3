"""Shows shapes in the reference as they are written.

mkdocstrings takes the `"batch *event"` of an annotation for a product.
"""

import re

PRODUCT = re.compile(r'(?:<span class="n">)?\b(\w+)(?:</span> <span class="o">| )\*'
                     r'(?:</span> <span class="n">| )(event|shape)\b(?:</span>)?')  # fmt: skip


def on_page_content(html, page, config, files):
    """Write the products of the API's pages as shapes."""
    return PRODUCT.sub(r'"\1 *\2"', html) if page.url.startswith("api/") else html
