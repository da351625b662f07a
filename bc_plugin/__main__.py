"""``python -m bc_plugin`` is ``bc-plugin``."""

from .cli import main

if __name__ == "__main__":
    main()
