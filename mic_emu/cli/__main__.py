"""``python -m mic_emu.cli``."""

from mic_emu.cli import main

main()
