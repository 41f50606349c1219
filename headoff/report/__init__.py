"""A sweep on disk: figures, tables, and a page that a browser shows without a network.

story.py    sentences: the verdict, and what became of each object
evidence.py sentences on an explanation
tables.py   rows for CSV, the contents of sweep.json
maps.py     relevance maps as data for the page's script
switches.py all subsets of heads as data for the page's switches
page.py     index.html, from templates/
drawing.py  the choice of figures, and their files
output.py   the output folder: files are written atomically, sweep.json last
links.py    links between the pages of a folder
folder.py   the index page of a folder of images
heads.py    the report on what heads contribute: heads_data.py for its page's script, heads_story.py for sentences
evaluation.py  the summary of a data set: evaluation_tables.py, evaluation_story.py for sentences, worst_images.py
"""

from headoff.report.folder import folder_index
from headoff.report.heads import HEADS_SCHEMA_VERSION, heads_index, write_heads_report
from headoff.report.output import (
    FINISHED,
    finished_file,
    has_results,
    is_finished,
    remove_report,
    write_report,
)
from headoff.report.story import verdict
from headoff.report.tables import SCHEMA_VERSION

__all__ = [
    "FINISHED",
    "HEADS_SCHEMA_VERSION",
    "SCHEMA_VERSION",
    "finished_file",
    "folder_index",
    "has_results",
    "heads_index",
    "is_finished",
    "remove_report",
    "verdict",
    "write_heads_report",
    "write_report",
]
