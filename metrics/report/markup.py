"""HTML and SVG built from Python values, escaped by construction: a plain string is always text, never markup."""

from __future__ import annotations

import html
from collections.abc import Iterable

VOID = frozenset({"img", "link", "meta"})
"""HTML's elements without content and end tag (of those used here)."""


class Markup(str):
    """Text that is HTML already, as `tag` makes it. Nothing that comes from a file is ever wrapped in it."""


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """The element `name` with `content`, in which whatever is not Markup is escaped.

    Attributes that are None are left out. An underscore stands for a dash, one at the end for nothing: `class_`,
    `aria_label`.

        tag("p", "a < b, ", tag("strong", "sure"), class_="note")  ->  <p class="note">a &lt; b, <strong>sure</strong></p>
    """
    named = {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items() if value is not None}
    given = "".join(f' {key}="{html.escape(value)}"' for key, value in named.items())
    return Markup(f"<{name}{given}>") if name in VOID else Markup(f"<{name}{given}>{joined(content)}</{name}>")


def joined(parts: Iterable[object]) -> Markup:
    """The parts one after the other, escaped where they are not Markup."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in parts))
