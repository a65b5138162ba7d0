"""Makes `python -m harness.cli` the same as `edgemoe-farm`."""

from harness.cli import main

main()
