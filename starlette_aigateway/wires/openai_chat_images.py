"""Images in a request: an image costs tokens by its size in pixels, which nobody knows before it is decoded.

Its bytes say nothing about that: a blank picture compresses to nothing and is billed by its tiles. Nor are they tokens: vendors decode an
inlined image, and bill what they see.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..types import CompletionRequest, ImageTokens

IMAGE_PARTS = frozenset({"image_url", "input_image", "image"})
_IMAGE = re.compile(r"data:image/(png|jpe?g|webp|gif|heic|heif|bmp)(;[\w.+=-]+)*;base64,", re.IGNORECASE)
"""Pictures of one page: a PDF or an SVG in the place of an image has no bound (RFC 2397 for the form)."""


class Images(NamedTuple):
    """How many images a request has, what they can cost in `tokens` at the most, and how many of the request's `bytes` are only theirs."""

    number: int
    tokens: int
    bytes: int


NO_IMAGES = Images(0, 0, 0)


def images(request: CompletionRequest, bounds: ImageTokens) -> Images:
    """All images of `request`, those in messages of tools and inside of other parts too."""
    number = tokens = size = 0
    for message in request.messages:
        content = message.get("content")
        if type(content) is str or not isinstance(content, list | tuple):
            continue
        for part in _image_parts(content):
            number += 1
            tokens += bounds.at(_detail(part))
            url = inlined(part)
            size += len(url) if url is not None and url.isascii() else 0
    return Images(number, tokens, size) if number else NO_IMAGES


def inlined(part: Mapping[str, Any]) -> str | None:
    """The data URL of an image part that is nothing else; None for an address, a file of the vendor's and anything unknown."""
    image = part.get("image_url")
    if isinstance(image, dict):
        if any(value for name, value in image.items() if name not in ("url", "detail")) or not isinstance(image.get("detail"), str | None):
            return None
        image = image.get("url")
    return image if isinstance(image, str) and _IMAGE.match(image) else None


def _image_parts(value: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, list | tuple):
        for member in value:
            yield from _image_parts(member)
    elif isinstance(value, dict):
        kind = value.get("type")
        if isinstance(kind, str) and kind in IMAGE_PARTS:
            yield value
        else:
            for member in value.values():
                if not isinstance(member, str):
                    yield from _image_parts(member)


def _detail(part: Mapping[str, Any]) -> Any:
    image = part.get("image_url")
    return image.get("detail") if isinstance(image, dict) else part.get("detail")
