"""Reports over run folders: Markdown, CSV, LaTeX, plots, one HTML page, and a ranking of several runs."""
