"""Which network names exist, read from the source text of timm and torchvision: importing them would take seconds."""

import importlib.util
import re
from functools import cache
from pathlib import Path

_REGISTERED = re.compile(r"^@register_model(?:\(\))?\s*\n(?:@[^\n]*\n)*def (\w+)\(", re.MULTILINE)


@cache
def arch_names() -> tuple[str, ...]:
    """timm's registered names, and torchvision's classification networks as torchvision/NAME, sorted."""
    timm = _registered("timm", "models")
    torchvision = [f"torchvision/{name}" for name in _registered("torchvision", "models", folders=False)]
    return tuple(sorted([*timm, *torchvision]))


def _registered(package: str, folder: str, folders: bool = True) -> list[str]:
    spec = importlib.util.find_spec(package)
    assert spec, f"{package} is not installed"
    assert spec.submodule_search_locations, f"{package} is no package"
    root = Path(spec.submodule_search_locations[0]) / folder
    paths = root.rglob("*.py") if folders else root.glob("*.py")
    return [name for path in paths for name in _REGISTERED.findall(path.read_text(encoding="utf-8"))]
