"""What several test files share: the model that ships with the package, and the public data where it is at hand."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

# For `import chat_server` and `import sweeps` from any folder of tests.
sys.path[:0] = [str(Path(__file__).parent / "safety"), str(Path(__file__).parent)]

# Read when trackio is imported, which TRL does: its database must not land in the user's home.
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp(prefix="trackio-")


@pytest.fixture(scope="session")
def tiny():
    """`(model, tokenizer)` of the testbed in float32; whoever changes either works on a copy."""
    from hf_safe_ema import testbed

    return testbed.load()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public data files beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no public data files: {folder} is not there (it is not part of the repository)")
    return folder
