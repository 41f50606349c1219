"""`headoff live`: a local page with a switch for every head, whose boxes and maps follow.

commands.py  the command line and the Python that give the same result
session.py   images, and what a detector finds in them under what the reader has switched
server.py    the web server, for this machine's browser alone (needs the extra `headoff[live]`)

The page itself is report/templates/live.html.
"""
