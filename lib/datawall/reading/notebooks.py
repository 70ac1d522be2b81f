"""Executed notebooks as pages of the report, by nbconvert."""

import re
from functools import cache, cached_property
from pathlib import Path
from typing import Any


class Notebook:
    """A notebook as it was executed."""

    def __init__(self, path: Path) -> None:
        import nbformat

        self.name, self.node = path.stem, nbformat.read(path, as_version=4)

    @cached_property
    def opening(self) -> list[str]:
        """Title and first paragraph, as plain text."""
        first = next((cell.source for cell in self.node.cells if cell.cell_type == "markdown"), self.name)
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[*_`]", r"\1", first)
        title, *rest = [part.strip() for part in plain.split("\n\n")]
        return [title.lstrip("# "), rest[0] if rest else ""]

    @property
    def seconds(self) -> float | None:
        """How long its last execution took."""
        return self.node.metadata.get("papermill", {}).get("duration")

    @property
    def error(self) -> str | None:
        """What it failed with."""
        outputs = [output for cell in self.node.cells for output in cell.get("outputs", [])]
        return next((f"{o.ename}: {o.evalue}" for o in outputs if o.output_type == "error"), None)

    def html(self) -> Any:
        """Its HTML, without markup that could run, each picture described by the section that it is in."""
        from markupsafe import Markup

        heading = ""
        for cell in self.node.cells:
            if cell.cell_type == "markdown":
                headings = [line.lstrip("# ") for line in cell.source.splitlines() if line.startswith("#")]
                heading = (headings or [heading])[0]
            for output in cell.get("outputs", []):
                if "image/png" in output.get("data", {}):
                    output.metadata["image/png"] = {"alt": f"Figure: {heading}"}
        body, _ = _exporter().from_notebook_node(self.node)
        return Markup(re.sub(r'(href="\w+)\.ipynb', r"\1.html", body))  # noqa: S704 - cleaned


@cache
def _exporter() -> Any:
    """Made once, since it compiles its templates."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(template_name="basic", sanitize_html=True)
    exporter.register_filter("clean_html", _cleaned)
    return exporter


def _cleaned(markup: Any) -> str:
    """Markup without what could run or reach out: nbconvert's own filter would take headings and tables too."""
    import bleach

    blocks = ("p", "pre", "br", "hr", "div", "span", "img", "table", "caption", "thead", "tbody", "tr", "th", "td")
    tags = {*bleach.ALLOWED_TAGS, *blocks, *(f"h{level}" for level in range(1, 7))}
    spans = ["colspan", "rowspan"]
    attributes = {"*": ["class", "id"], "a": ["href", "title"], "th": spans, "td": spans, "img": ["src", "alt"]}
    # Of pandas' tables, style sheets go, and empty heads become cells.
    plain = re.sub(r"<style.*?</style>", "", str(markup), flags=re.DOTALL)
    plain = re.sub(r"<th([^>]*)>\s*</th>", r"<td\1></td>", plain)
    return bleach.clean(plain, tags, attributes, protocols={"http", "https", "mailto"}, strip=True)


def code_colours() -> str:
    """Style of highlighted code; all its colours are dark enough to read on the page's shade."""
    from pygments.formatters import HtmlFormatter

    return HtmlFormatter(style="xcode", nobackground=True).get_style_defs(".highlight")
