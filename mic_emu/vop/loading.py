"""Classes that users name as ``MODULE:CLASS``."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


class LoadError(Exception):
    """The class cannot be had; the sentence says why."""


def load_class(name: str, base: type, folder: str = "") -> type:
    """The class ``MODULE:CLASS``, a subclass of ``base``; modules are looked for in ``folder``, too.

    Raises LoadError.
    """
    module_name, _, class_name = name.partition(":")
    if not module_name or not class_name:
        raise LoadError(f"{name!r}: write MODULE:CLASS")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        module = importlib.import_module(module_name)
        found = getattr(module, class_name)
    except ModuleNotFoundError as e:
        where = f", nor in {Path(folder)}" if folder else ""
        raise LoadError(f"{name}: there is no module {e.name!r} in the Python path{where}") from e
    except AttributeError as e:
        raise LoadError(f"{name}: {e}") from e
    except Exception as e:  # the module's own code
        raise LoadError(f"{name}: importing it failed: {type(e).__name__}: {e}") from e
    if not (isinstance(found, type) and issubclass(found, base)):
        raise LoadError(f"{name} is no subclass of {base.__module__}.{base.__qualname__}")
    return found
