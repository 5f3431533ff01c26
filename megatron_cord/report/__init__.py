"""Reports of runs: an HTML page (``page.page``), a live page (``live.server``), a table for the terminal."""
