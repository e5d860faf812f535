"""Runs side by side: read, compared, tabulated, drawn, and put into one page."""
