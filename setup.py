"""configs/ lies at the root, where people look for it, and is sd3tune/configs in the wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sd3tune", "sd3tune.*"]), "sd3tune.configs"],
    package_dir={"sd3tune.configs": "configs"},
)
