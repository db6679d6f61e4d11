"""Take the pictures of README and docs/bags.md of the default run in this workspace (`make demo`): python -m docs.tools.pictures

python -m docs.tools.pictures REPORT    takes README's picture of another run, of photographs, from its reports/index.html
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

DOCS = Path(__file__).parents[1]
ROW = 5
BINGO = [sys.executable, "-m", "bingo.cli.main", "bags"]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-background-networking", "--no-first-run"]


def take(page: Path, fragment: str, picture: Path, width_px: int, height_px: int) -> None:
    """A page as Chromium draws it in a window of this size, as a PNG of 256 colours."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("error: chromium is not installed; install it, e.g. by apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        options = [*FLAGS, f"--user-data-dir={profile}", f"--window-size={width_px},{height_px}", f"--screenshot={picture}"]
        subprocess.run([chromium, *options, page.resolve().as_uri() + fragment], check=True, stderr=subprocess.DEVNULL)
    Image.open(picture).convert("RGB").quantize(256).save(picture, optimize=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        take(Path(sys.argv[1]), "", DOCS / "report-photographs.png", 1200, 1150)
        sys.exit()
    (DOCS / "bag.png").unlink(missing_ok=True)  # bags show replaces no file
    subprocess.run([*BINGO, "show", str(ROW), "--out", str(DOCS / "bag.png"), "--force"], check=True)
    subprocess.run([*BINGO, "gallery"], check=True)
    take(Path(".bingo/gallery/index.html"), f"#row={ROW}", DOCS / "gallery.png", 1280, 900)
    take(Path("reports/index.html"), "", DOCS / "report.png", 1200, 1150)
