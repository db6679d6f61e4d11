"""Names of networks and of their weights, read from the source text of timm and torchvision, because importing them would take seconds."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

from bingo.runtime.errors import near_matches

OWN = Path(__file__).parents[1] / "nets/own"
_TAGGED = re.compile(r"""['"](\w+)\.(\w+)['"]\s*:""")
_REGISTERED = re.compile(r"^@register_model(?:\(\))?\s*\n(?:@[^\n]*\n)*def (\w+)\(", re.MULTILINE)


@cache
def arch_names() -> tuple[str, ...]:
    """timm's registered names, and torchvision's classification networks as torchvision/NAME, sorted."""
    timm = _registered("timm", "models")
    torchvision = [f"torchvision/{name}" for name in _registered("torchvision", "models", folders=False)]
    return tuple(sorted([*timm, *torchvision]))


@cache
def weight_tags() -> dict[str, tuple[str, ...]]:
    """timm's tags of pretrained weights by network, in timm's order: the first is the default.

    A few networks that timm registers in a loop are not found.
    """
    tags: dict[str, list[str]] = {}
    for path in _folder("timm", "models").rglob("*.py"):
        for name, tag in _TAGGED.findall(path.read_text(encoding="utf-8")):
            tags.setdefault(name, []).append(tag)
    return {name: tuple(dict.fromkeys(tags[name])) for name in arch_names() if name in tags}


def arch_mistake(arch: str, give: str = "set arch:") -> str | None:
    """The error in `arch`, with a way to fix it (`give` NAME), or None if it is one of `arch_names`, or NAME.TAG for timm."""
    if re.search(r"\.py(:|$)", arch):  # not in a tag of timm, such as pycls_in1k
        return own_mistake(arch)
    name, dot, tag = arch.partition(".")
    if name not in arch_names():
        plain = re.sub(r"^(hf[-_]hub:)?timm/", "", arch)
        if plain != arch and arch_mistake(plain) is None:
            return f"timm's names are used without the hub's prefix; {give} {plain}"
        return f"no network of timm (or torchvision/NAME) has this name{near_matches(name, arch_names())}"
    tags = weight_tags().get(name, ())
    if not dot or tag in tags or (tag and not tags and not name.startswith("torchvision/")):
        return None
    if not tags:
        return f"torchvision has no tags, {name} stands for its default weights; {give} {name}"
    return f"timm has no weights of {name} with this tag{near_matches(tag, tags)}; it has {', '.join(tags)}"


def tag_mistake(arch: str, give: str) -> str | None:
    """The error in an `arch` with a timm tag if no weights are loaded, with a way to fix it (`give` NAME), or None without a tag."""
    plain, dot, _ = arch.partition(".")
    return f"the tag names weights that are not loaded here; {give} {plain}" if dot and plain in arch_names() else None


def own_mistake(factory: str) -> str | None:
    """The error in the name of the user's own network, FILE.py:FUNCTION in the folder OWN, or None; the file is parsed, not run."""
    file, _, function = factory.partition(":")
    if not re.fullmatch(r"\w+\.py", file) or not (OWN / file).is_file():
        names = sorted(path.name for path in OWN.glob("*.py") if path.stem != "__init__")
        return f"allowed is FILE.py:FUNCTION of a file in bingo/nets/own{near_matches(file, names)}; put the file there, next to example.py"
    try:
        parsed = ast.parse((OWN / file).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError) as error:
        return f"bingo/nets/own/{file} is not valid Python ({error}); correct it"
    functions = [node.name for node in parsed.body if isinstance(node, ast.FunctionDef)]
    if function not in functions:
        return f"bingo/nets/own/{file} has no such function{near_matches(function, functions)}; set one of {', '.join(functions) or 'none'}"
    return None


def _registered(package: str, folder: str, folders: bool = True) -> list[str]:
    root = _folder(package, folder)
    paths = root.rglob("*.py") if folders else root.glob("*.py")
    return [name for path in paths for name in _REGISTERED.findall(path.read_text(encoding="utf-8"))]


def _folder(package: str, folder: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec, f"{package} is not installed"
    assert spec.submodule_search_locations, f"{package} is not a package"
    return Path(spec.submodule_search_locations[0]) / folder
