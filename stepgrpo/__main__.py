"""``python -m stepgrpo``."""

from stepgrpo.cli import main

main()
