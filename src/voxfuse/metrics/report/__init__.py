"""Results as CSV, Markdown, JSON and one self-contained HTML page."""

from voxfuse.metrics.report.page import html_page
from voxfuse.metrics.report.pictures import Miss, find_misses
from voxfuse.metrics.report.tables import Report, markdown, write_tables

__all__ = ["Miss", "Report", "find_misses", "html_page", "markdown", "write_tables"]
