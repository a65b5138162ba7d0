"""Every error that records, the results database, exports and pages raise on purpose.

ReportError               one line for a person, naming the run, file or key and the remedy        exit code
├── RecordError           a record is malformed, or its parts contradict one another               2
├── DatabaseError         the results database cannot be opened, read or written                   2
│   ├── OutageError       its server was away for longer than one waits                            1
│   └── MovedError        what was decided rests on what is otherwise by now                       2
├── UnknownSweepError     no sweep, or more than one, answers to that id                           2
├── BundleError           a bundle is damaged, or is none                                          2
└── SelectionError        what was asked for is no part of a sweep, or not there                   2
"""

from __future__ import annotations


class ReportError(Exception):
    exit_code = 2


class RecordError(ReportError):
    pass


class DatabaseError(ReportError):
    pass


class OutageError(DatabaseError):
    exit_code = 1


class MovedError(DatabaseError):
    pass


class UnknownSweepError(ReportError):
    pass


class BundleError(ReportError):
    pass


class SelectionError(ReportError):
    pass
