"""Pages of HTML from the templates of `eval/templates`. Needs the extra `eval`."""

from pathlib import Path
from typing import Any

import jinja2

from scmmgpt.commands.page_words import unbroken


TEMPLATES = Path(__file__).parents[1] / "eval" / "templates"


def render_page(template: str, **values: Any) -> str:
    """The page of a template; a number and its percent sign stay on one line.

    The template has the filters `number` and `signed`, each with a number of digits.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value, digits=3: (
        "–" if value is None else f"{value:.{digits}f}".replace("-", "−")
    )
    environment.filters["signed"] = lambda value, digits=3: f"{value:+.{digits}f}".replace("-", "−")
    return unbroken(environment.get_template(template).render(**values))
