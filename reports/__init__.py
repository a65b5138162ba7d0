"""What is kept and what is shown: records, the results database, statistics and pages."""

from reports.errors import ReportError as ReportError
