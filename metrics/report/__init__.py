"""An evaluation as one HTML page that loads nothing."""

from metrics.report.page import Neighbours, Report, write_report

__all__ = ["Neighbours", "Report", "write_report"]
