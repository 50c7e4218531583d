"""`python -m seqkern.cli`, for launchers of processes."""

from seqkern.cli import main

main()
