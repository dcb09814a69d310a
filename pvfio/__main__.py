"""``python -m pvfio`` is the ``pvfio`` command."""

from pvfio.cli import main

if __name__ == "__main__":
    main()
