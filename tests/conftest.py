import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")          # for small tensors threads only wait for each other
sys.path.insert(0, str(Path(__file__).parent.parent))  # the programs are flat files beside this folder

for number in signal.Signals:
    stop = number.name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if stop and signal.getsignal(number) == signal.SIG_IGN:     # a shell's background: the programs would honour it, too
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    """The tests of a file run in a folder of their own, with a text of 300 small documents."""
    path, before = tmp_path_factory.mktemp("text"), os.getcwd()
    os.chdir(path)
    documents = [f"The {i} cats sat on the {i * 7 % 31} mats." for i in range(300)]
    Path("text.txt").write_text("\n\n".join(documents))
    yield path
    os.chdir(before)
