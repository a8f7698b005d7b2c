"""Importing `aclip.models` costs what torch costs."""

import subprocess
import sys


def test_importing_the_package_imports_no_heavy_library():
    code = ("import sys, aclip.models\n"
            "print([name for name in ('open_clip', 'timm', 'torchvision', 'transformers', 'torch._dynamo')"
            " if name in sys.modules])\n"
            "aclip.models.shape_of, aclip.models.load, aclip.models.tokenizer_of")
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
