"""Commands start without the script's folder on the path, so files beside the script hide no library."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
from pretrain.errors import run_command

def main():
    import wave
    print(wave.__file__)

run_command(main)
"""


def test_a_scripts_neighbours_hide_no_library(tmp_path: Path) -> None:
    """`tools/evaluate.py` would otherwise hide a library called evaluate."""
    (tmp_path / "tools").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "tools")
    (tmp_path / "tools" / "wave.py").touch()
    (tmp_path / "tools" / "command.py").write_text(SCRIPT)
    for folder in ("tools", "link"):
        found = subprocess.run(
            [sys.executable, str(tmp_path / folder / "command.py")], capture_output=True, text=True, check=True
        )
        assert Path(found.stdout.strip()).parent == Path(subprocess.__file__).parent
