"""Read artefacts by path, from the workspace or from any Git revision or DVC experiment.

Files of a revision are read from the DVC cache, or from the remote if they are not in the cache; nothing is checked out or
written. DVC is imported only then.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from bingo import paths
from bingo.params.places import expanded, located
from bingo.runtime.errors import UserError

PARAMS = Path("params.yaml")
WORKSPACE = "workspace"


class Workspace:
    """The files in the workspace that was the current folder."""

    name = WORKSPACE
    is_workspace = True

    def __init__(self) -> None:
        self.folder = Path.cwd()

    def store(self, path: Path) -> Any:
        """A zarr store, as `zarr.open_group` takes it."""
        return self.folder / path

    def open(self, path: Path) -> BinaryIO:
        """A file, opened for reading. Raises OSError if it is absent."""
        return open(self.folder / path, "rb")

    def open_image(self, path: Path) -> BinaryIO:
        """An image file of the dataset. Raises OSError if it is absent."""
        return open(self.folder / located(str(_seen_from(self.folder, path))), "rb")

    def local(self, path: Path, folder: Path) -> Path:
        """A local path of the file, which is copied into `folder` if necessary."""
        return _seen_from(Path.cwd(), self.folder / path)

    def title(self, path: Path) -> str:
        """The artefact's name in messages."""
        return path.as_posix()

    @property
    def dataset(self) -> dict[str, Any]:
        """The section dataset of the parameters."""
        from bingo.params import read_yaml

        return _dataset(read_yaml(self.local(PARAMS, self.folder)))


class Revision:
    """The files of one Git revision or DVC experiment of this repository. Raises UserError if the name is unknown."""

    is_workspace = False

    def __init__(self, name: str):
        self.name, self.folder = name, Path.cwd()
        with self._mistakes():
            self._files = _files_of(self)

    def store(self, path: Path) -> Any:
        """A zarr store, as `zarr.open_group` takes it. Raises UserError if the revision has none or its data are gone."""
        self.open(path / "zarr.json").close()
        return self._files.get_mapper(path.as_posix())

    def open(self, path: Path) -> BinaryIO:
        """A file, opened for reading. Raises UserError if the revision has none or its data are gone."""
        with self._mistakes():
            try:
                return self._files.open(path.as_posix())
            except FileNotFoundError:
                raise self.absent(path.as_posix()) from None

    def open_image(self, path: Path) -> BinaryIO:
        """An image file of the dataset: the revision's, if the dataset is tracked, otherwise the current file."""
        path = _seen_from(self.folder, path)
        if not path.is_absolute() and self._hash(path.as_posix()):
            return self.open(path)
        return open(self.folder / located(str(path)), "rb")

    def local(self, path: Path, folder: Path) -> Path:
        """The file, copied into `folder`."""
        with self.open(path) as file:
            (folder / path.name).write_bytes(file.read())
        return folder / path.name

    def title(self, path: Path) -> str:
        """The artefact's name in messages."""
        return f"{path.as_posix()} of {self.name}"

    @cached_property
    def dataset(self) -> dict[str, Any]:
        """The section dataset of the revision's parameters."""
        from ruamel.yaml import YAML

        with self.open(PARAMS) as file:
            return _dataset(YAML(typ="safe", pure=True).load(file.read()))

    def absent(self, path: str) -> UserError:
        """Why a file cannot be read, in one line."""
        out = next((str(known) for known in _OUTPUTS if path == str(known) or path.startswith(f"{known}/")), path)
        if self._hash(path) or self._hash(out):
            again = f"git worktree add ../again {self._files.repo.get_rev()[:7]}, and there: dvc repro bag"
            return UserError(
                f"{out} of {self.name}: its data are neither in the DVC cache nor on a remote; push them from the machine that made them"
                f" (dvc push, dvc exp push), or recreate them: {again}"
            )
        way_out = "commit dvc.lock after dvc repro (git add dvc.lock, git commit), and give that commit"
        return UserError(f"{out} of {self.name}: this revision has no such file, because its dvc.lock does not list it; {way_out}")

    def _hash(self, path: str) -> str | None:
        try:
            return self._files.info(path).get("md5")
        except OSError:
            return None

    @contextmanager
    def _mistakes(self) -> Iterator[None]:
        from dvc.exceptions import DvcException, NotDvcRepoError
        from dvc.scm import RevError, SCMError

        try:
            yield
        except RevError:
            known = "see `git log --oneline --all` and `dvc exp list --all-commits`"
            raise UserError(f"{self.name}: is neither a commit nor a DVC experiment of this repository; {known}") from None
        except (NotDvcRepoError, SCMError):
            raise UserError(
                f"{self.name}: {Path.cwd()} is not in a repository of Git and DVC; change into the folder of params.yaml and dvc.yaml"
            ) from None
        except DvcException as error:
            raise UserError(f"{self.name}: DVC says: {' '.join(str(error).split())}") from None


_OUTPUTS = (paths.BAGS, paths.IMAGES, paths.EMBEDDINGS)  # folders: a message names the output, not the chunk


def artefacts(name: str | None) -> Workspace | Revision:
    """The workspace (None or its name) or a revision. Raises UserError if the name is empty, which Git and DVC take for HEAD."""
    if name is not None and not name.strip():
        raise UserError("a revision is empty: give a Git revision, a DVC experiment, or: workspace")
    return Workspace() if name in (None, WORKSPACE) else Revision(name)


def _seen_from(folder: Path, path: Path) -> Path:
    """A path relative to a folder if it lies in it."""
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _files_of(revision: Revision) -> Any:
    from dvc.api import DVCFileSystem
    from dvc.scm import RevError

    class Files(DVCFileSystem):  # type: ignore[misc]
        """zarr treats a file that cannot be read as one that was never written; this distinguishes the two. Relative paths refer to the
        folder that was current when this was opened."""

        @cached_property
        def place(self) -> str:
            return str(super().getcwd())

        def getcwd(self) -> str:
            return self.place

        def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
            try:
                return super().cat_file(path, *args, **kwargs)
            except FileNotFoundError:
                if revision._hash(path.strip("/")):
                    raise revision.absent(path.strip("/")) from None
                raise

    try:
        files = Files(".", rev=revision.name)
        assert files.repo is not None  # opens it, so that an unknown revision is reported now
    except AttributeError:  # from DVC, for the hash of a tree or a blob
        raise RevError(revision.name) from None
    assert files.place
    return files


def _dataset(params: Any) -> dict[str, Any]:
    section = params.get("dataset") if isinstance(params, dict) else None
    if not isinstance(section, dict) or not isinstance(root := section.get("root"), str):
        return section if isinstance(section, dict) else {}
    try:
        return section | {"root": expanded(root)}
    except ValueError as error:
        raise UserError(f"dataset.root = {root}: {error}") from None
