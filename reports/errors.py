"""Every error that records, the results database, exports and pages raise on purpose.

ReportError               one line for a person, naming the run, file or key and the remedy
├── RecordError           a record is malformed, or its parts contradict one another
├── DatabaseError         the results database cannot be opened, read or written
└── UnknownSweepError     no sweep, or more than one, answers to that id
"""

from __future__ import annotations


class ReportError(Exception):
    exit_code = 2


class RecordError(ReportError):
    pass


class DatabaseError(ReportError):
    pass


class UnknownSweepError(ReportError):
    pass
