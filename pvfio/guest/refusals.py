"""What the host, the IOMMU driver and the page tables refuse, as the error of the VFIO request that ran into it.

Not here: what a request itself refuses (``type1_errors.py``, ``ioas.py``).
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from pvfio.errors import HypercallError, IommuError, PageTableError, VfioError

__all__ = ["as_vfio_errors"]


@contextmanager
def as_vfio_errors(operation: str) -> Iterator[None]:
    """Turns a refusal inside into ``VfioError`` of ``operation``, with the same errno; ENOMEM for lack of memory."""
    try:
        yield
    except (HypercallError, IommuError, PageTableError) as error:
        raise VfioError(error.errno or errno.EIO, operation, error.reason) from error
    except MemoryError as error:
        raise VfioError(errno.ENOMEM, operation, str(error)) from error
