"""The report of a verification: its JSON document as one HTML page, or as Markdown for the summary of a CI job.

document.py   the JSON document: its parts, and a sentence for what is not one
words.py      numbers, counts and places for people
failures.py   failures by what is wrong: hundreds with one cause are one entry
ratios.py     benchmark ratios and where they are drawn
pictures.py   each picture on the page once
rendering.py  the page, from templates/
markdown.py   the summary
files.py      from a JSON file to a file

Everything is made of the document alone, which may come from another machine: nothing here needs torch or pytest.
"""

from headoff.harness.report.document import FORMAT, Document, validate
from headoff.harness.report.files import render_file
from headoff.harness.report.markdown import summary
from headoff.harness.report.rendering import render

__all__ = ["FORMAT", "Document", "render", "render_file", "summary", "validate"]
