"""Which packages the wheel holds, `configs/` inside one of them; all else about it stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["pipeline*"]), "pipeline.configs"],
    package_dir={"pipeline.configs": "configs"},
)
