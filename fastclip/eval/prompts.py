"""What is said about a class: templates, and the texts made of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files


@cache
def imagenet_templates() -> tuple[str, ...]:
    """The CLIP paper's 80 templates for ImageNet (arXiv 2103.00020, section 3.1.4)."""
    text = files("fastclip.eval").joinpath("imagenet_templates.txt").read_text(encoding="utf-8")
    return tuple(text.splitlines())


def fill(templates: Sequence[str], name: str) -> list[str]:
    """Each template with `name` in place of its ``{}``."""
    return [template.replace("{}", name) for template in templates]


def check_templates(templates: Sequence[str], field: str) -> None:
    """Raise ValueError, naming `field`, unless every template has exactly one ``{}``."""
    if not templates:
        raise ValueError(f"{field} is empty; the plainest list is '{{}}' alone")
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f"{field}: {template!r} does not hold exactly one {{}}")
