"""Small SVG files with metadata as Open Clip Art's have them."""

from __future__ import annotations

from collections.abc import Sequence

NAMES = (
    'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" xmlns:dc="http://purl.org/dc/elements/1.1/" '
    'xmlns:cc="http://web.resource.org/cc/"'
)


def drawing(
    body: str,
    title: str = "",
    keywords: Sequence[str] = (),
    licence: str = "http://web.resource.org/cc/PublicDomain",
    creator: str = "",
    size: str = 'width="100" height="100"',
    names: str = NAMES,
) -> str:
    """An SVG file of 100 x 100 pixels."""
    words = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return (
        f'<?xml version="1.0"?>\n<svg {names} {size}><metadata><rdf:RDF><cc:Work rdf:about=""><dc:title>{title}'
        f"</dc:title><dc:subject><rdf:Bag>{words}</rdf:Bag></dc:subject><dc:creator><cc:Agent><dc:title>{creator}"
        f'</dc:title></cc:Agent></dc:creator><cc:license rdf:resource="{licence}"/></cc:Work></rdf:RDF></metadata>'
        f"{body}</svg>"
    )


def circle(radius: float, number: int, colour: str = "") -> str:
    """A circle whose place and colour depend on a number."""
    x, y = 10 + 17 * number % 80, 10 + 41 * number % 80
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour or f"hsl({number * 47 % 360}, 80%, 40%)"}"/>'
