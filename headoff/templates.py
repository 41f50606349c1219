"""Jinja templates of pages: the one way to read them."""

from __future__ import annotations

from collections.abc import Callable

import jinja2

from headoff.wording import counted, format_seconds


def template(name: str, read: Callable[[str], str]) -> jinja2.Template:
    """The template called `name`, with the filters `counted` and `seconds`.

    Everything that is put in is escaped: messages, ids and class names come from other people's code and files. A
    variable that is not there is an error.

    Args:
        read: the source of a template, for this one and those that it includes.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"counted": counted, "seconds": format_seconds}
    return environment.get_template(name)
