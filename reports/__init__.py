"""Results, kept and shown: records, the results database, statistics and pages."""

from reports.errors import ReportError as ReportError
