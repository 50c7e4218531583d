"""Device kernels, installed as `seqkern.kernels`; they import nothing of seqkern."""

from pathlib import Path

# With the repository root on sys.path this folder would answer to `import kernels`, which is the
# name of another project.
if __name__ != "seqkern.kernels":
    raise ImportError(
        f"this package is seqkern.kernels and cannot be imported as {__name__!r}: "
        f"{Path(__file__).parents[1]} must not be on sys.path; start Python with -P, or in another "
        "folder"
    )
