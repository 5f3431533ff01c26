"""The record of a run, made to be read: an HTML page (``page.render``) and a table for the terminal (``terminal.evaluation_table``)."""
