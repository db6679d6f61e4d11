"""Worker processes: what they import, and what they share with the server that they are forked from."""

import os
import subprocess
import sys
from pathlib import Path

IMPORTED = "from os import getpid\nwith open('{name}', 'a') as file:\n    file.write(f'{{getpid()}}\\n')\n"
WORK = "def run():\n    open(f'ran{getpid()}', 'w').close()\n"
PROGRAM = """import needed
from bingo.runtime.workers import fork_server

if __name__ == "__main__":
    import work
    context = fork_server("work")
    workers = [context.Process(target=work.run) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
"""


def test_workers_share_what_their_work_and_the_program_import(tmp_path):
    (tmp_path / "needed.py").write_text(IMPORTED.format(name="by_the_program"))
    (tmp_path / "work.py").write_text(IMPORTED.format(name="by_the_work") + WORK)
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-m", "program"], cwd=tmp_path, env=environment, check=True)
    ran = {int(path.name.removeprefix("ran")) for path in tmp_path.glob("ran*")}
    assert len(ran) == 3
    for name in ("by_the_program", "by_the_work"):
        importers = list(map(int, (tmp_path / name).read_text().split()))
        assert len(importers) == 2, "once in the program, once in the server"
        assert not ran & set(importers)
