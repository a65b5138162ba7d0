"""Defines every error that the engine raises on purpose.

EngineError                 one line for a person, naming the file or key and the remedy
├── RequestError            what was asked for is malformed or cannot be done          exit 2
│   └── ProtocolError       a message that does not fit the schema
├── ContainerError          a container or profile is damaged, hostile or unsupported  exit 3
├── MemoryBudgetError       the run does not fit the memory that it was given          exit 4
├── StorageError            the storage refused or broke off a read                    exit 5
├── DeadlineError           the run did not end within its deadline                    exit 6
└── NumberError             the arithmetic gave something that is no number            exit 7
"""

from __future__ import annotations


class EngineError(Exception):
    """Reports a failure that is not a bug: `kind` crosses the wire, the shell sees `exit_code`."""

    kind = "engine"
    exit_code = 1


class RequestError(EngineError):
    kind = "request"
    exit_code = 2


class ProtocolError(RequestError):
    kind = "protocol"


class ContainerError(EngineError):
    kind = "container"
    exit_code = 3


class MemoryBudgetError(EngineError):
    kind = "memory"
    exit_code = 4


class StorageError(EngineError):
    kind = "storage"
    exit_code = 5


class DeadlineError(EngineError):
    kind = "deadline"
    exit_code = 6


class NumberError(EngineError):
    kind = "number"
    exit_code = 7
