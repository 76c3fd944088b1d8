from __future__ import annotations

from metrics.report.markup import tag


def test_tag_escapes_all_but_markup() -> None:
    element = tag("p", "a < b", tag("b", "&"), 3, class_='"x"', aria_label=None, data_x="'")
    assert element == '<p class="&quot;x&quot;" data-x="&#x27;">a &lt; b<b>&amp;</b>3</p>'
