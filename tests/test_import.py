"""import hgprompt is quiet and without side effects, also where there is no GPU, no Triton and no Matplotlib; without
Triton the plain network runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHECK = """
import os, sys, warnings, logging
warnings.simplefilter("error")
sys.modules["triton"] = None  # as if it were not installed
sys.modules["matplotlib"] = None
before = dict(os.environ)
import torch
state = torch.get_rng_state()
import hgprompt
assert dict(os.environ) == before
assert torch.equal(torch.get_rng_state(), state)
assert not torch.cuda.is_initialized()
assert "timm" not in sys.modules
assert "kernels" not in sys.modules
assert not logging.getLogger().handlers
assert all(hasattr(hgprompt, name) for name in hgprompt.__all__)
import hgprompt.kernels.attention

from hgprompt.kernels import report
assert report.main([]) == 1  # and says why

warnings.simplefilter("default")  # other packages' own
sys.path.insert(0, "tests")
import literal
from hgprompt import FrozenViT, encode
vit = FrozenViT.from_timm(literal.tiny_vit())
assert encode(vit, torch.zeros(1, 2, 16), torch.zeros(1, 3, 16, 16)).isfinite().all()
"""


def test_import_is_quiet_and_harmless():
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("\n") == 1
    assert "no Triton" in done.stdout
