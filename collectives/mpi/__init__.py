"""The `mpi` backend of c10d, over mpi4py: ``register()``, then ``init_process_group``. Imports no MPI by itself."""

from .registration import NAME, register

__all__ = ["NAME", "register"]
