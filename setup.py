"""Maps kernels/ to hgprompt.kernels; everything else stands in pyproject.toml.

The kernels know tensors only and lie beside the package in the repository. They must never be installed as a
top-level module of so common a name. (hgprompt/kernels is a link to them, so that a checkout works uninstalled.)
"""

from setuptools import find_packages, setup

packages = [p for p in find_packages(include=["hgprompt", "hgprompt.*"]) if not p.startswith("hgprompt.kernels")]
setup(
    packages=[*packages, "hgprompt.kernels"],
    package_dir={"hgprompt.kernels": "kernels"},
)
