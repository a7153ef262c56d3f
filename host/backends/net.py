"""placeholder"""
from typing import Any


def main(args: dict[str, Any], fds: list[int]) -> int:
    return 1
