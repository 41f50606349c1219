"""A sweep on disk: figures, tables, and a page that a browser shows without a network.

story.py    sentences: the verdict, and what became of each object
evidence.py sentences on an explanation
tables.py   rows for CSV, the contents of sweep.json
maps.py     relevance maps as data for the page's script
page.py     index.html, from templates/
drawing.py  the choice of figures, and their files
output.py   the output folder: files are written atomically, sweep.json last
links.py    links between the pages of a folder
folder.py   the index page of a folder of images
"""

from headoff.report.folder import folder_index
from headoff.report.output import FINISHED, has_results, is_finished, remove_report, write_report
from headoff.report.story import verdict
from headoff.report.tables import SCHEMA_VERSION

__all__ = [
    "FINISHED",
    "SCHEMA_VERSION",
    "folder_index",
    "has_results",
    "is_finished",
    "remove_report",
    "verdict",
    "write_report",
]
