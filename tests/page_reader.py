"""A page of HTML read back strictly, and a search for everything in it that could load or run something."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

from metrics.report.markup import VOID


@dataclass
class Element:
    """An element of a parsed page."""

    name: str
    attributes: dict[str, str | None]
    parent: Element | None = None
    children: list[Element | str] = field(default_factory=list)

    def all(self, name: str, class_: str | None = None) -> list[Element]:
        inner = [found for child in self.children if isinstance(child, Element) for found in child.all(name, class_)]
        mine = self.name == name and (class_ is None or class_ in (self.attributes.get("class") or "").split())
        return [self, *inner] if mine else inner

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)


class Tree(HTMLParser):
    """Builds the elements and refuses end tags that do not fit."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.root = self.open = Element("document", {})
        self.feed(source)
        self.close()
        assert self.open is self.root, f"<{self.open.name}> is never closed"

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        element = Element(name, dict(attributes), self.open)
        self.open.children.append(element)
        if name not in VOID:
            self.open = element

    def handle_endtag(self, name: str) -> None:
        assert self.open.name == name, f"</{name}> ends <{self.open.name}>"
        assert self.open.parent is not None
        self.open = self.open.parent

    def handle_data(self, text: str) -> None:
        self.open.children.append(text)


def outside(root: Element) -> list[str]:
    """Every address in a page that is not data: within it, and every element and attribute that could run or load."""
    found = [element.name for name in ("script", "iframe", "object", "embed", "form", "base") for element in root.all(name)]
    for element in every(root):
        for key, value in element.attributes.items():
            if key.startswith("on") or (key in ("src", "href", "srcset", "data") and not str(value).startswith("data:")):
                found.append(f"{element.name} {key}={value}")
        text = element.text if element.name == "style" else element.attributes.get("style") or ""
        found += re.findall(r"@import|url\(|https?:", text)
    return found


def every(element: Element) -> list[Element]:
    return [element, *(found for child in element.children if isinstance(child, Element) for found in every(child))]
