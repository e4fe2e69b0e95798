"""Packages that `find:` cannot see: configs/ is installed as `hpgr_plugin/configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["hpgr_plugin*"]), "hpgr_plugin.configs"],
    package_dir={"hpgr_plugin.configs": "configs"},
    package_data={"hpgr_plugin.configs": ["**/*.gin"]},
)
