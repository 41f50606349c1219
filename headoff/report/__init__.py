"""A sweep on disk: figures, tables, and a page that shows it all in a browser without a network.

story.py    sentences: the verdict, and what became of each object
evidence.py what an explanation shows, in sentences
tables.py   rows for CSV, the contents of sweep.json
maps.py     relevance maps as data for the page's script
page.py     index.html, from templates/
output.py   the output folder: every file whole or not there, sweep.json last
folder.py   the index page of a folder of images
"""

from headoff.report.folder import folder_index
from headoff.report.output import FINISHED, is_finished, write_report
from headoff.report.story import verdict
from headoff.report.tables import SCHEMA_VERSION

__all__ = ["FINISHED", "SCHEMA_VERSION", "folder_index", "is_finished", "verdict", "write_report"]
